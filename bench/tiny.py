"""A tiny base, and runs of it whose loop is timed: what several benches share."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

# Before torch comes: tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import TrainerCallback

from trimtab_api.contract import DataInput, JobIdentity, ModelInput, OutputTarget, RunConfig
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.model import Scratch
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.model import scratch, tokenizer
from trimtab_trainer.notice import Notice
from trimtab_trainer.progress import Silent
from trimtab_trainer.run import Run

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MAX_LENGTH = 256
WORDS = (
    *("the", "harbour", "is", "calm", "tonight", "and", "every", "ship"),
    *("that", "comes", "home", "finds", "its", "own", "light", "again"),
)
Row = dict[str, Any]


def said(draw: random.Random, longest: int = 40) -> str:
    """Half as many to `longest` words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(longest // 2, longest)))


def turn(role: str, text: str) -> list[Row]:
    """A conversation of one turn."""
    return [{"role": role, "content": text}]


def written(rows: list[Row], path: Path) -> Path:
    """JSON lines in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny(folder: Path) -> Path:
    """A Llama of 1.5 million weights with a ChatML template."""
    shape = {"modelType": "llama", "hiddenSize": 160, "layers": 4, "attentionHeads": 4, "maxLength": MAX_LENGTH}
    rows = [{"messages": turn("user", " ".join(WORDS)) + turn("assistant", " ".join(WORDS))}]
    tokenizer.learn(rows, 340, None, None, folder)
    words = tokenizer.load(folder, "base")
    asked = Scratch.model_validate({**shape, "tokenizer": {"train": {"vocabSize": 340}}})
    scratch.build(asked, words, [0, 2], seed=3).save_pretrained(folder)
    return folder


def config(base: Path, data: Path, output: Path, **document: Any) -> RunConfig:
    """run.json of a job on the base."""
    common = {
        "model": {"from": {"fineTuneJob": {"name": "base"}}},
        "dataset": {"train": [{"from": {"volume": {"claimName": "data"}}}], "maxLength": MAX_LENGTH},
    }
    dataset = {**common["dataset"], **document.pop("dataset", {})}
    spec = FineTuneJobSpec.model_validate({**common, **document, "dataset": dataset})
    return RunConfig(
        job=JobIdentity(namespace="bench", name="bench", uid="bench"),
        attempt=1,
        spec=spec,
        resolved=resolve(spec),
        model=ModelInput(field="model.from", reference="fineTuneJob/base", path=str(base)),
        train=[DataInput(field="dataset.train[0]", part=spec.dataset.train[0], path=str(data))],
        output=OutputTarget(path=str(output)),
    )


class Clock(TrainerCallback):
    """Seconds of the loop, by the wall and by the processor."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """See TrainerCallback."""
        self._began = time.perf_counter(), time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """See TrainerCallback."""
        self.wall = time.perf_counter() - self._began[0]
        self.processor = time.process_time() - self._began[1]


class TimedRun(Run):
    """A run that tells how long its loop took."""

    def _trainer(self, *parts: Any) -> Any:
        made = super()._trainer(*parts)
        self.clock = Clock()
        made[0].add_callback(self.clock)
        return made


def timed(wanted: RunConfig, work: Path) -> Clock:
    """Run to the end in this process; how long the loop took."""
    forget()
    run = TimedRun(wanted, Group(Place(0, 0, 1, 1), 1, 60), work, Notice(), Silent())
    run()
    return run.clock


def forget() -> None:
    """A run has its process for itself, and libraries leave their switches in it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
