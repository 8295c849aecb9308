"""A tiny model that answers yes or no by chance, and runs of it in this process."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.unit.trainer.conftest import conversation, lines, run_config, spec, training
from trimtab_api.contract import Ending, ModelInput, ProgressReport, RunConfig
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.notice import Notice

with warnings.catch_warnings():
    # The libraries' own deprecations, at their first import.
    warnings.simplefilter("ignore")
    import trl.trainer.grpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

ASKED = ("is it calm?", "is it late?", "are you sure?", "can we sail?", "is the ship old?", "shall I go?")
SCRATCH = {
    "modelType": "llama", "hiddenSize": 48, "layers": 2, "attentionHeads": 2, "maxLength": 64,
    "tokenizer": {"train": {"vocabSize": 320}},
}  # fmt: skip

TOLD = lines([conversation(f"say {answer}", answer) for answer in ("yes", "no") for _ in range(6)])
"""Teaches that the two answers are two: an adapter could else not part them on so small a model."""


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(solution: str = "yes") -> str:
    """Questions with the answer that is wanted, as JSON lines."""
    messages = [[{"role": "user", "content": asked}] for asked in ASKED]
    return lines([{"messages": each, "solution": solution} for each in messages])


def answered(*answers: str) -> str:
    """Each question with each of these answers, as JSON lines."""
    return lines([conversation(asked, answer) for asked in ASKED for answer in answers])


@dataclass
class _Leaves:
    """A reporter that gives notice once a step was reported."""

    at: int | None
    notice: Notice
    reports: list[ProgressReport] = field(default_factory=list)

    def report(self, report: ProgressReport) -> None:
        self.reports.append(report)
        if self.at is not None and report.progress is not None and report.progress.step >= self.at:
            self.notice.given = True

    def close(self) -> None:
        """Nothing is kept open."""


def run(config: RunConfig, leave_at: int | None = None) -> Ending:
    """One run in this process. Raises Fault(Preempted) after the step that follows `leave_at`."""
    from trimtab_trainer.run import Run

    group = Group(Place(rank=0, local_rank=0, world=1, local_world=1), config.resolved.world_size, 60)
    assert config.output.path is not None
    output, notice = Path(config.output.path), Notice()
    return Run(config, group, output.with_name(output.name + "-work"), notice, _Leaves(leave_at, notice))()


def job(
    method: str, base: Path, output: Path, further: dict[str, Path] | None = None, name: str = "job", **fields: Any
) -> RunConfig:
    """run.json of a job on the base; `further` are the models beside it, by field."""
    model = {"from": {"fineTuneJob": {"name": "base"}}, **fields.pop("model", {})}
    wanted = spec(method, model=model, **fields)
    beside = [
        ModelInput(field=place, reference=f"fineTuneJob/{folder.parent.name}", path=str(folder))
        for place, folder in (further or {}).items()
    ]
    return run_config(wanted, output, name=name, model=base, further=beside)


def tuned(way: str) -> dict[str, Any]:
    """The fields of a job that is tuned in full, by LoRA, or by LoRA on a base of 4 bit (qlora)."""
    if way == "full":
        return {"tuner": {"type": "full"}}
    quantised = {"model": {"quantization": {"method": "bnb4"}}} if way == "qlora" else {}
    return {"tuner": {"type": "lora", "lora": {"dropout": 0}}, **quantised}


def logged(output: Path, key: str) -> list[float]:
    """A metric at each step of a finished run."""
    entries = json.loads((output / "report" / "history.json").read_text())
    return [entry[key] for entry in entries if key in entry]


def timeless(history: bytes) -> list[dict[str, Any]]:
    """A history without what the clock and the start of the process decide."""
    apart = ("train_", "total_flos", "step_time")
    return [{key: value for key, value in entry.items() if not key.startswith(apart)} for entry in json.loads(history)]


def pretrained(folder: Path, rows: str, steps: int, tokenizer: Path | None = None) -> Path:
    """A tiny model that has learnt to answer as the rows do; with the tokenizer of another."""
    scratch: dict[str, Any] = dict(SCRATCH)
    if tokenizer is not None:
        scratch["tokenizer"] = {"from": {"fineTuneJob": {"name": "base"}}}
    wanted = spec(
        "pretrain",
        rows,
        model={"scratch": scratch},
        dataset={"train": [{"from": {"inline": rows}}], "maxLength": 64},
        training=training(maxSteps=steps, perDeviceBatchSize=24, learningRate=1e-2, loggingSteps=steps),
        checkpoint={"saveSteps": 10_000},
    )
    given = None
    if tokenizer is not None:
        given = ModelInput(field="model.scratch.tokenizer.from", reference="fineTuneJob/base", path=str(tokenizer))
    run(run_config(wanted, folder, name=folder.name, tokenizer=given))
    return folder / "artifact"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers yes and no about equally often."""
    return pretrained(tmp_path_factory.mktemp("rollout") / "base", answered("yes", "no") + TOLD, steps=150)


Made = Callable[..., FineTuneJobSpec]


def _texts(answer: str) -> list[str]:
    return [f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for asked in ASKED]


@pytest.fixture(scope="session")
def judge(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learnt to like yes more than no."""
    from trimtab_trainer.inputs import LocalModel
    from trimtab_trainer.model import scalar, tokenizer

    words = tokenizer.load(base, "base")
    local = LocalModel(path=base, reference="base", digest=None)
    model = scalar.load(local, "base", torch.float32, labels=1, seed=3, pad_token_id=words.pad_token_id)
    liked, disliked = (words(_texts(answer), return_tensors="pt", padding=True) for answer in ("yes", "no"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        scores = [model(**each).logits[:, 0] for each in (liked, disliked)]
        # The pairs fix the difference alone; the target also fixes where yes and no stand.
        loss = ((scores[0] - 3) ** 2).mean() + ((scores[1] + 3) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("taste") / "artifact"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base after it has learnt to answer yes nine times of ten."""
    from transformers import AutoModelForCausalLM

    from trimtab_trainer.model import tokenizer

    words = tokenizer.load(base, "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    batch = words(_texts("yes") * 9 + _texts("no"), return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("teacher") / "artifact"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
