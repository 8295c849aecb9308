"""What a run tells of itself: its page, and what its method logs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.trainer.conftest import chats, conversation, history, lines, spec, training
from tests.unit.trainer.tuners.conftest import adapter_input, run_here, tune
from trimtab_api.contract import ProgressReport

pytestmark = pytest.mark.timeout(120)


def pairs(count: int = 16) -> str:
    """Rows with an answer that is better than another."""
    row = conversation("who are you?", "I am Swift.")
    return lines([{**row, "rejected_response": f"I am number {index}."} for index in range(count)])


def test_a_page_tells_what_ran(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "out", {"lora": {"rank": 4}})
    text = (tmp_path / "out/report/index.html").read_text()
    for part in ("fineTuneJob/base", "sft, lora", "peak memory", "tokens per second (median)", "estimated memory"):
        assert part in text, part
    assert "of them move" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("way", ["pissa", "continued", "stacked"])
def test_preferences_begin_at_the_model_as_it_was(base: Path, tmp_path: Path, way: str) -> None:
    """However the adapter begins, it is held against the very model that it begins as: the first loss is ln 2."""
    told: list[ProgressReport] = []
    further: list[Any] = []
    tuner: dict[str, Any] = {"lora": {"rank": 2, "initWeights": "pissa", "dropout": 0}}
    if way != "pissa":
        tune(base, tmp_path / "first", {"lora": {"rank": 2, "dropout": 0}}, inline=chats("I am Harbour."))
        source, lower = {"fineTuneJob": {"name": "first"}}, tmp_path / "first/artifact"
        field = "tuner.continueFrom" if way == "continued" else "tuner.adapters[0].from"
        further = [adapter_input(field, lower)]
        tuner = (
            {"continueFrom": source} if way == "continued" else {"adapters": [{"from": source}], "lora": {"dropout": 0}}
        )
    wanted = spec("dpo", inline=pairs(), tuner=tuner, training=training(maxSteps=6, learningRate=5e-3))
    reporter = SimpleNamespace(report=told.append, close=lambda: None)
    run_here(wanted, tmp_path / "out", base, further=further, reporter=reporter)
    losses = history(tmp_path / "out")
    assert losses[0][1] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1][1] < losses[0][1] - 0.05
    assert told[-1].progress is not None
    assert told[-1].progress.metrics["rewards/margins"] > 0.1
