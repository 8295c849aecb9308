"""Two processes learn what one learns from the same rows: an anchor is told apart from the texts of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import StartRanks, history, lines, run_config, spec, training
from tests.unit.trainer.heads.conftest import FULL, Tune
from tests.unit.trainer.heads.test_embedding import related
from trimtab_api.contract import Exit

KNOBS: dict[str, Any] = {"optimizer": "sgd", "learningRate": 0.01, "maxSteps": 4, "maxGradNorm": 0}
"""Gradients of another size would make other steps, which Adam would hide."""


@proves("embedding", "ddp")
@pytest.mark.timeout(200)
def test_negatives_come_from_all_processes(start_ranks: StartRanks, tune: Tune, base: Path, tmp_path: Path) -> None:
    rows = related(32, 1)
    for index, row in enumerate(rows):
        row["negatives"] = ["a calm sea today"] * (index % 3)
    knobs = {**KNOBS, "perDeviceBatchSize": 4, "weightDecay": 0}
    wanted = spec(
        "embedding",
        dataset={"train": [{"from": {"inline": lines(rows)}}], "maxLength": 64, "shuffle": False},
        training=training(**knobs),
        distributed={"processesPerNode": 2},
        **FULL,
    )
    ranks = start_ranks(run_config(wanted, tmp_path / "of-two", model=base))
    alone = tune(
        "embedding", rows, name="alone", dataset={"shuffle": False}, training={**knobs, "perDeviceBatchSize": 8}, **FULL
    )
    assert ranks.end().exit is Exit.OK, ranks.log[-3000:]
    together = [loss for _, loss in history(tmp_path / "of-two")]
    assert together == pytest.approx(alone.losses(), abs=1e-4)
    assert max(together) - min(together) > 0.1
