"""Whole runs in this process: importing the libraries costs a new one more than ten seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import run_config, spec, training
from trimtab_api.contract import Ending, ProgressReport
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.notice import Notice


class LeavesAt:
    """A reporter that tells the run to leave after a step."""

    def __init__(self, step: int | None, notice: Notice):
        self._step = step
        self._notice = notice

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""
        if self._step is not None and report.progress is not None and report.progress.step >= self._step:
            self._notice.given = True

    def close(self) -> None:
        """See Reporter."""


Train = Callable[..., Ending]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs a small job in this process: train(name, dataset, steps, leave_at=None) → Ending, or its Fault."""

    def run(
        name: str, dataset: dict[str, Any], steps: dict[str, Any], leave_at: int | None = None, **fields: Any
    ) -> Ending:
        from trimtab_trainer.run import Run

        given = {key: fields.pop(key) for key in ("train", "attempt", "tokenizer") if key in fields}
        lowered = fields.pop("resolved", {})
        wanted = spec(dataset={"maxLength": 32, **dataset}, training=training(**steps), **fields)
        config = run_config(wanted, tmp_path / name, **given)
        config = config.model_copy(update={"resolved": config.resolved.model_copy(update=lowered)})
        notice = Notice()
        group = Group(Place(0, 0, 1, 1), 1, 60)
        return Run(config, group, tmp_path / f"{name}-work", notice, LeavesAt(leave_at, notice))()

    return run


def losses(output: Path) -> list[tuple[int, float]]:
    """Step and loss of every log line of a finished run."""
    entries = json.loads((output / "report" / "history.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def weights(output: Path) -> bytes:
    """The weights that a run made."""
    return (output / "artifact" / "model.safetensors").read_bytes()
