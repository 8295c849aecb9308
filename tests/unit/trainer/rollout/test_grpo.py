"""grpo: the mean reward of what the model says rises by far; the advantages; going on in the middle of a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.matrix import proves
from tests.unit.trainer.conftest import training
from tests.unit.trainer.rollout.conftest import job, logged, prompts, run, timeless, tuned
from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

pytestmark = pytest.mark.timeout(120)

PLAN = training(maxSteps=16, perDeviceBatchSize=24, gradientAccumulationSteps=1, learningRate=5e-3)
DATA = {"train": [{"from": {"inline": prompts()}}], "maxLength": 48}
GRPO: dict[str, Any] = {"rewards": [{"name": "accuracy"}], "numGenerations": 4, "maxCompletionLength": 6, "beta": 0.01}
JUDGED = "grpo.rewards[1].rewardModel.from"


def _job(
    base: Path,
    output: Path,
    tuner: str = "full",
    plan: Any = PLAN,
    further: Any = None,
    solution: str = "yes",
    **knobs: Any,
) -> Any:
    data = {**DATA, "train": [{"from": {"inline": prompts(solution)}}]}
    return job("grpo", base, output, further, dataset=data, training=plan, grpo={**GRPO, **knobs}, **tuned(tuner))


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@proves("grpo", "full", "lora", "qlora")
def test_reward_rises(base: Path, tmp_path: Path, tuner: str) -> None:
    plan = {**PLAN, "learningRate": 2e-3} if tuner == "full" else PLAN
    # Quantised, the base says yes more often.
    ending = run(_job(base, tmp_path / "out", tuner, plan, solution="no" if tuner == "qlora" else "yes"))
    assert ending.artifact is not None
    rewards = logged(tmp_path / "out", "reward")
    assert sum(rewards[:2]) / 2 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.9
    assert not (tmp_path / "out/artifact/ref").exists()


@pytest.mark.parametrize("tuner", ["full", "lora"])
@proves("grpo", "resume")
def test_goes_on_in_the_middle_of_a_round(base: Path, tmp_path: Path, tuner: str) -> None:
    """With several passes over the same answers, across epochs: metrics and weights are the undisturbed run's."""
    plan = training(maxSteps=6, perDeviceBatchSize=4, gradientAccumulationSteps=2, loggingSteps=2)
    calm, disturbed = (_job(base, tmp_path / name, tuner, plan, numIterations=2) for name in ("calm", "disturbed"))
    run(calm)
    with pytest.raises(Fault) as left:
        run(disturbed, leave_at=4)
    assert (left.value.reason, left.value.step) == (Reason.PREEMPTED, 5)
    assert run(disturbed).from_step == 5
    weights = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    for name in ("calm", "disturbed"):
        assert not list((tmp_path / name).rglob("ref"))
    one, other = ((tmp_path / name / "artifact" / weights).read_bytes() for name in ("calm", "disturbed"))
    assert one == other
    one, other = ((tmp_path / name / "report/history.json").read_bytes() for name in ("calm", "disturbed"))
    assert timeless(one) == timeless(other)


LOSSES = [
    {"lossType": name, "beta": 0} for name in ("grpo", "bnpo", "drGrpo", "dapo", "sapo")
] + [
    {"lossType": "cispo", "epsilonHigh": 5, "scaleRewards": "batch"},
    {"importanceSampling": "sequence", "numIterations": 2, "scaleRewards": "none"},
]  # fmt: skip


@pytest.mark.parametrize("knobs", LOSSES, ids=lambda knobs: "-".join(str(value) for value in knobs.values()))
def test_every_loss_learns_from_the_weighted_sum(
    base: Path, judge: Path, tmp_path: Path, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name and a reward model together; the advantages are the paper's, of the weighted sum."""
    earned: list[torch.Tensor] = []
    gained: list[torch.Tensor] = []
    ask, lose = GRPOTrainer._calculate_rewards, GRPOTrainer._compute_loss

    def asked(self: Any, *each: Any) -> Any:
        earned.append(ask(self, *each))
        return earned[-1]

    def lost(self: Any, model: Any, inputs: Any) -> Any:
        gained.append(inputs["advantages"])
        return lose(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", asked)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lost)
    rewards = [{"name": "accuracy"}, {"rewardModel": {"from": {"fineTuneJob": {"name": "taste"}}}, "weight": 0.5}]
    plan = training(maxSteps=2, perDeviceBatchSize=8, gradientAccumulationSteps=1)
    run(_job(base, tmp_path / "out", "full", plan, {JUDGED: judge}, rewards=rewards, **knobs))
    assert all(abs(loss) < 100 for loss in logged(tmp_path / "out", "loss"))
    groups = (earned[0] @ torch.tensor([1, 0.5])).view(-1, 4)
    spread = {"group": groups.std(dim=1, keepdim=True), "batch": groups.std(), "none": None}[
        knobs.get("scaleRewards", "group")
    ]
    wanted = groups - groups.mean(dim=1, keepdim=True)
    if spread is not None:
        wanted = wanted / (spread + 1e-4)
    torch.testing.assert_close(gained[0].sort().values, wanted.flatten().sort().values, atol=1e-5, rtol=0)


def test_a_part_of_a_group_is_refused(base: Path, tmp_path: Path) -> None:
    plan = training(perDeviceBatchSize=6, gradientAccumulationSteps=1)
    with pytest.raises(Fault, match=r"grpo.numGenerations: 4 does not divide the global batch of 6"):
        run(_job(base, tmp_path / "out", "full", plan))


def test_answers_must_fit_behind_the_prompt(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="more than the 64 that the model is made for"):
        run(_job(base, tmp_path / "out", maxCompletionLength=60))


def test_evaluation_logs_the_reward(base: Path, tmp_path: Path) -> None:
    data = {**DATA, "validation": DATA["train"]}
    plan = training(maxSteps=2, perDeviceBatchSize=8, gradientAccumulationSteps=1, evalSteps=1)
    config = job("grpo", base, tmp_path / "out", dataset=data, training=plan, tuner={"type": "full"}, grpo=GRPO)
    run(config)
    assert len(logged(tmp_path / "out", "eval_reward")) == 2
    assert json.loads((tmp_path / "out/artifact/args.json").read_text())["spec"]["method"] == "grpo"
