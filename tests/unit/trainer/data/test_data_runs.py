"""Data as whole runs use it: packs, streams, caches; each gone on from where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import lines
from tests.unit.trainer.data.conftest import Train, losses, weights
from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

pytestmark = pytest.mark.timeout(400)

WORDS = ("harbour", "tide", "calm", "ship", "light", "night")


def _texts(count: int = 60) -> str:
    return lines([{"text": " ".join(WORDS[(i + j) % 6] for j in range(1 + i % 7))} for i in range(count)])


def _rows(text: str) -> dict[str, Any]:
    return {"train": [{"from": {"inline": text}}]}


def _resumed(train: Train, tmp_path: Path, dataset: dict[str, Any], steps: dict[str, Any], **fields: Any) -> None:
    """A run that was told to leave and went on is the undisturbed one, to the last bit."""
    train("calm", dataset, steps, **fields)
    with pytest.raises(Fault) as caught:
        train("disturbed", dataset, steps, leave_at=3, **fields)
    assert caught.value.reason is Reason.PREEMPTED
    again = train("disturbed", dataset, steps, attempt=2, **fields)
    assert again.from_step == caught.value.step
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "calm")
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "calm")


def test_a_packed_run_goes_on_where_it_stopped(train: Train, tmp_path: Path) -> None:
    dataset = {**_rows(_texts()), "packing": {"strategy": "bfd"}}
    _resumed(train, tmp_path, dataset, {"maxSteps": 6, "perDeviceBatchSize": 2})


def test_a_padding_free_run_learns_what_a_padded_one_does(train: Train, tmp_path: Path) -> None:
    train("padded", _rows(_texts()), {"maxSteps": 3})
    train("free", {**_rows(_texts()), "paddingFree": True}, {"maxSteps": 3})
    for (_, padded), (_, free) in zip(losses(tmp_path / "padded"), losses(tmp_path / "free"), strict=True):
        assert free == pytest.approx(padded, abs=1e-4)
