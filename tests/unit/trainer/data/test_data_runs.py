"""Data as whole runs use it: packs, streams, caches; each gone on from where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import SCRATCH, lines
from tests.unit.trainer.data.conftest import Train, losses, weights
from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput
from trimtab_trainer.endings import Fault

pytestmark = pytest.mark.timeout(400)

WORDS = ("harbour", "tide", "calm", "ship", "light", "night")


def _texts(count: int = 60) -> str:
    return lines([{"text": " ".join(WORDS[(i + j) % 6] for j in range(1 + i % 7))} for i in range(count)])


def _rows(text: str) -> dict[str, Any]:
    return {"train": [{"from": {"inline": text}}]}


def _from_base(train: Train, tmp_path: Path) -> dict[str, Any]:
    """A model from scratch with the tokenizer of an earlier job."""
    artifact = tmp_path / "base" / "artifact"
    if not artifact.is_dir():
        train("base", _rows(_texts()), {"maxSteps": 1})
    scratch = {**SCRATCH, "tokenizer": {"from": {"fineTuneJob": {"name": "base"}}}}
    tokenizer = ModelInput(field="model.scratch.tokenizer.from", reference="fineTuneJob/base", path=str(artifact))
    return {"model": {"scratch": scratch}, "tokenizer": tokenizer}


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


def test_a_streamed_run_goes_on_where_it_stopped_in_a_later_epoch(train: Train, tmp_path: Path) -> None:
    dataset = {**_rows(_texts(10)), "streaming": {"shuffleBuffer": 4}, "loss": "all"}
    # Ten rows and four in a batch: the run is told to leave in its second epoch, in the middle of a block.
    _resumed(train, tmp_path, dataset, {"maxSteps": 7, "gradientAccumulationSteps": 2}, **_from_base(train, tmp_path))


def test_a_broken_row_in_a_stream_ends_the_run_with_its_number(train: Train, tmp_path: Path) -> None:
    dataset = {**_rows(_texts(600) + "{broken\n"), "streaming": {}, "shuffle": False}
    given = _from_base(train, tmp_path)
    with pytest.raises(Fault, match="inline row 601: not JSON") as caught:
        train("broken", dataset, {"maxSteps": 30, "perDeviceBatchSize": 64}, **given)
    assert caught.value.reason is Reason.DATA_INVALID
    ending = train(
        "skipped",
        {**dataset, "strict": False},
        {"maxSteps": 12, "perDeviceBatchSize": 64},
        **_from_base(train, tmp_path),
    )
    assert "1 broken rows were passed over" in ending.message


def test_a_run_goes_on_with_half_as_many_rows_in_a_pass(train: Train, tmp_path: Path) -> None:
    """What the operator asks for when memory ran out: the same rows in the same steps."""
    rows, steps = _rows(_texts()), {"maxSteps": 6, "perDeviceBatchSize": 4}
    train("calm", rows, steps)
    with pytest.raises(Fault):
        train("lowered", rows, steps, leave_at=3)
    half = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train("lowered", rows, steps, attempt=2, resolved=half).from_step == 4
    calm, lowered = losses(tmp_path / "calm"), losses(tmp_path / "lowered")
    assert [step for step, _ in lowered] == [step for step, _ in calm]
    for (_, whole), (_, halved) in zip(calm, lowered, strict=True):
        assert halved == pytest.approx(whole, abs=1e-4)
    made = json.loads((tmp_path / "lowered" / "artifact" / "args.json").read_text())
    assert (made["microBatchSize"], made["globalBatchSize"]) == (2, 4)


def test_a_padding_free_run_learns_what_a_padded_one_does(train: Train, tmp_path: Path) -> None:
    train("padded", _rows(_texts()), {"maxSteps": 3})
    train("free", {**_rows(_texts()), "paddingFree": True}, {"maxSteps": 3})
    for (_, padded), (_, free) in zip(losses(tmp_path / "padded"), losses(tmp_path / "free"), strict=True):
        assert free == pytest.approx(padded, abs=1e-4)
