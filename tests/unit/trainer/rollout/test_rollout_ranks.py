"""Two processes over gloo: each method runs, and losses do not depend on how a step is spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import StartRanks, conversation, history, lines, training
from tests.unit.trainer.rollout.conftest import ASKED, job, logged, prompts, run
from trimtab_api.contract import Exit

QUESTIONS = {"train": [{"from": {"inline": prompts()}}], "maxLength": 48}
ANSWERS = {
    "train": [{"from": {"inline": lines([conversation(asked, "yes" * (i % 3 + 1)) for i, asked in enumerate(ASKED)])}}],
    "maxLength": 48,
}


@pytest.mark.timeout(240)
@proves("grpo", "ddp")
@proves("ppo", "ddp")
@proves("gkd", "ddp")
def test_two_ranks(base: Path, judge: Path, teacher: Path, start_ranks: StartRanks, tmp_path: Path) -> None:
    def fields(rows: int, processes: int) -> dict[str, Any]:
        plan = training(maxSteps=4, perDeviceBatchSize=rows, gradientAccumulationSteps=2)
        spread = {"processesPerNode": processes, "strategy": "ddp"}
        return {"training": plan, "distributed": spread, "tuner": {"type": "full"}}

    grpo = {"rewards": [{"name": "accuracy"}], "numGenerations": 4, "maxCompletionLength": 4}
    ppo = {"rewardModel": {"from": {"fineTuneJob": {"name": "taste"}}}, "epochs": 2, "responseLength": 4}
    gkd = {"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "lmbda": 0}
    reward, taught = {"ppo.rewardModel.from": judge}, {"gkd.teacher.from": teacher}
    jobs = {
        "grpo": job("grpo", base, tmp_path / "grpo", dataset=QUESTIONS, grpo=grpo, **fields(4, 2)),
        "ppo": job("ppo", base, tmp_path / "ppo", reward, dataset=QUESTIONS, ppo=ppo, **fields(2, 2)),
        "gkd": job("gkd", base, tmp_path / "gkd", taught, dataset=ANSWERS, gkd=gkd, **fields(2, 2)),
    }
    for name, config in jobs.items():
        # One after the other: a port that was free for one run may be taken by the connections of another.
        ranks = start_ranks(config)
        assert ranks.end(80).exit is Exit.OK, (name, ranks.log)
    assert len(logged(tmp_path / "grpo", "reward")) == 4
    assert len(logged(tmp_path / "ppo", "reward")) == 2
    run(job("gkd", base, tmp_path / "alone", taught, dataset=ANSWERS, gkd=gkd, **fields(4, 1)))
    for (_, together), (_, alone) in zip(history(tmp_path / "gkd"), history(tmp_path / "alone"), strict=True):
        assert together == pytest.approx(alone, rel=1e-3)
