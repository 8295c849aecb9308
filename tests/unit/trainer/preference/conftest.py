"""One tiny base for all methods, pairs whose better answer it likes less, and runs in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.trainer.conftest import SCRATCH, conversation, lines, run_config, training
from trimtab_api.contract import Ending, ModelInput, ProgressReport
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.model import Scratch
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.model import scratch, tokenizer
from trimtab_trainer.notice import Notice
from trimtab_trainer.run import Run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

PLACES = ("harbour", "bridge", "river", "market", "tower", "garden", "castle", "station", "valley", "island")
ANSWERS = ("we sail at dawn", "we stay and wait")
PROMPT = "what do we do at the {}?"
HELD_OUT = PLACES[-3:]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of random weights with a ChatML template."""
    folder = tmp_path_factory.mktemp("preference") / "base"
    rows = [conversation(PROMPT.format(place), answer) for place in PLACES for answer in ANSWERS]
    tokenizer.learn(rows, 340, None, None, folder)
    loaded = tokenizer.load(folder, "base")
    scratch.build(Scratch.model_validate(SCRATCH), loaded, [0, 2], seed=3).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Judge:
    """How likely models find the two answers to prompts that no run sees."""

    base: Path
    chosen: str = ""
    rejected: str = ""

    def of(self, artifact: Path | None = None) -> tuple[list[float], list[float]]:
        """Log-probabilities of chosen and rejected answers, of the base or of what was made of it."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.base)
        if artifact is not None and (artifact / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(model, str(artifact))
        elif artifact is not None:
            model = AutoModelForCausalLM.from_pretrained(artifact)
        model.eval()
        text = AutoTokenizer.from_pretrained(self.base)
        return (
            [self._log_probability(model, text, place, self.chosen) for place in HELD_OUT],
            [self._log_probability(model, text, place, self.rejected) for place in HELD_OUT],
        )

    @staticmethod
    def _log_probability(model: Any, text: Any, place: str, answer: str) -> float:
        prompt = f"<|im_start|>user\n{PROMPT.format(place)}<|im_end|>\n<|im_start|>assistant\n"
        before = text(prompt, add_special_tokens=False)["input_ids"]
        ids = before + text(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = torch.tensor(ids[1:])[:, None]
        return float(found.gather(1, own)[len(before) - 1 :].sum())


@pytest.fixture(scope="session")
def judge(base: Path) -> Judge:
    """The better answer is the one that the base finds less likely."""
    one, other = Judge(base, *ANSWERS).of()
    chosen, rejected = ANSWERS if sum(one) < sum(other) else reversed(ANSWERS)
    return Judge(base, chosen, rejected)


def pairs(judge: Judge, count: int = 28) -> list[dict[str, Any]]:
    """Rows of a conversation that ends with the better answer, and the other one."""
    seen = PLACES[: -len(HELD_OUT)]
    return [
        {**conversation(PROMPT.format(seen[i % len(seen)]), judge.chosen), "rejected_response": judge.rejected}
        for i in range(count)
    ]


def job(
    method: str, rows: list[dict[str, Any]], tuner: str | dict[str, Any] = "lora", **fields: Any
) -> FineTuneJobSpec:
    """A spec for seconds."""
    steps = fields.pop("steps", {})
    document = {
        "method": method,
        "model": {"from": {"fineTuneJob": {"name": "base"}}},
        "dataset": {"train": [{"from": {"inline": lines(rows)}}], "maxLength": 128, **fields.pop("dataset", {})},
        "tuner": {"type": tuner} if isinstance(tuner, str) else tuner,
        "training": training(**{"maxSteps": 8, "learningRate": 1e-2, **steps}),
        "checkpoint": {"saveSteps": 100},
    }
    return FineTuneJobSpec.model_validate({**document, **fields})


class LeavesAt:
    """A reporter that tells the run to leave after a step."""

    def __init__(self, step: int | None, notice: Notice):
        self._step = step
        self._notice = notice

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""
        if self._step is not None and report.progress.step >= self._step:
            self._notice.given = True

    def close(self) -> None:
        """See Reporter."""


@dataclass(frozen=True)
class Tune:
    """Runs a job on the base in this process."""

    base: Path
    folder: Path

    def __call__(self, spec: FineTuneJobSpec, name: str = "run", leave_at: int | None = None, **fields: Any) -> Ending:
        """Train to the end. Raises the run's Fault."""
        for part in fields.get("further", []):
            assert isinstance(part, ModelInput)
        config = run_config(spec, self.folder / name, model=self.base, **fields)
        notice = Notice()
        group = Group(Place(0, 0, 1, 1), 1, 60)
        return Run(config, group, self.folder / f"{name}-work", notice, LeavesAt(leave_at, notice))()

    def history(self, name: str = "run") -> list[dict[str, Any]]:
        """The log lines of a run."""
        found: list[dict[str, Any]] = json.loads((self.folder / name / "report" / "history.json").read_text())
        return found

    def artifact(self, name: str = "run") -> Path:
        """What a run made."""
        return self.folder / name / "artifact"


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Tune:
    """Runs in this process, each with an output of its own."""
    return Tune(base, tmp_path)


Rows = Callable[[Judge], list[dict[str, Any]]]
