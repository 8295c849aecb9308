"""One tiny base for all heads: random weights, a tokenizer learnt from the words that the rows are made of."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.unit.trainer.conftest import SCRATCH, conversation, lines, run_config, training
from trimtab_api.contract import Ending, ModelInput, ProgressReport
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.model import Scratch
from trimtab_api.v1alpha1.status import Artifact
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scratch, tokenizer
from trimtab_trainer.notice import Notice
from trimtab_trainer.run import Run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

WORDS = (
    *("calm", "storm", "gale", "sunny", "bright", "rain", "fog", "harbour", "ship", "sail", "rudder", "anchor"),
    *("the", "a", "is", "was", "in", "we", "saw", "and", "then", "of", "very", "good", "bad", "today", "at", "sea"),
)
NOUNS = (
    *("harbour", "ship", "sail", "rudder", "anchor", "storm", "gale", "rain", "fog", "calm", "sunny", "bright"),
    *("lamp", "rope", "mast", "oar", "net", "tide", "pier", "gull", "whale", "crew", "deck", "flag"),
)
FILLERS = ("the", "a", "is", "was", "in", "we", "saw", "and", "then", "of", "very", "today", "at", "sea")


def said(draw: random.Random, *words: str, length: int = 8) -> str:
    """A text of fillers in which these words stand somewhere."""
    text = [draw.choice(FILLERS) for _ in range(length - len(words))] + list(words)
    draw.shuffle(text)
    return " ".join(text)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = {**SCRATCH, "hiddenSize": 48, "intermediateSize": 64}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """A run that ended well."""

    ending: Ending
    output: Path

    @property
    def artifact(self) -> Artifact:
        """What it published."""
        assert self.ending.artifact is not None
        return self.ending.artifact

    @property
    def folder(self) -> Path:
        """Where that lies."""
        return self.output / "artifact"

    @property
    def held_out(self) -> dict[str, float]:
        """The last evaluation, by name."""
        entries = json.loads((self.output / "report/history.json").read_text())
        last: dict[str, float] = [entry for entry in entries if "eval_loss" in entry][-1]
        return {name.removeprefix("eval_"): value for name, value in last.items()}

    def losses(self) -> list[float]:
        """Of every step."""
        entries = json.loads((self.output / "report/history.json").read_text())
        return [entry["loss"] for entry in entries if "loss" in entry]


class Quiet:
    """Reports to nobody."""

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""

    def close(self) -> None:
        """See Reporter."""


Tune = Callable[..., Done]


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Tune:
    """Run a job in this process, with the tiny base and inline rows."""

    def run(method: str, rows: Rows, held_out: Rows = (), name: str = "job", **fields: Any) -> Done:  # type: ignore[assignment]
        notice, start = fields.pop("notice", Notice()), fields.pop("base", base)
        further = fields.pop("further", [])
        document: dict[str, Any] = {
            "method": method,
            "model": {"from": {"fineTuneJob": {"name": "base"}}},
            "dataset": {
                "train": [{"from": {"inline": lines(rows)}}],
                "validation": [{"from": {"inline": lines(list(held_out))}}] if held_out else [],
                "maxLength": 64,
                **fields.pop("dataset", {}),
            },
            **fields,
            "training": training(**{"perDeviceBatchSize": 16, "weightDecay": 0, **fields.get("training", {})}),
        }
        wanted = FineTuneJobSpec.model_validate(document)
        source = None
        if wanted.model.from_ is not None:
            source = ModelInput(field="model.from", reference="s3://models/base", path=str(start))
        config = run_config(wanted, tmp_path / name, name=name, model=source, further=further)
        group = Group(Place.here(), 1, 60)
        return Done(Run(config, group, tmp_path / f"work-{name}", notice, Quiet())(), tmp_path / name)

    return run


FULL = {"tuner": {"type": "full"}}
LORA = {"tuner": {"lora": {"rank": 8, "dropout": 0}}}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of random weights with a ChatML template."""
    folder = tmp_path_factory.mktemp("heads") / "base"
    rows: list[dict[str, Any]] = [conversation(" ".join((*WORDS, *NOUNS)), " ".join((*NOUNS, *WORDS)))] * 4
    tokenizer.learn(rows, 700, None, None, folder)
    loaded = tokenizer.load(folder, "base")
    made = Scratch.model_validate(SMALL)
    model = scratch.build(made, loaded, [0, 2], seed=1)
    # Weights as large as trained ones: words then differ from the start, as they do in a model that has read.
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def local(base: Path) -> LocalModel:
    """The base as a run sees it."""
    return LocalModel(path=base, reference="s3://models/base", digest=None)
