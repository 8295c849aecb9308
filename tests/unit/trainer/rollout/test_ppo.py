"""ppo: the reward model's mean score rises by far; the formulas; going on in the middle of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.conftest import training
from tests.unit.trainer.rollout.conftest import job, logged, prompts, run, timeless, tuned
from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.rollout import advantages

pytestmark = pytest.mark.timeout(120)

PLAN = training(maxSteps=16, perDeviceBatchSize=12, gradientAccumulationSteps=2, learningRate=5e-3)
PPO: dict[str, Any] = {
    "rewardModel": {"from": {"fineTuneJob": {"name": "taste"}}},
    "epochs": 2,
    "responseLength": 6,
    "temperature": 1,
    "klCoef": 0.02,
    "missingEosPenalty": 1,
}
FIELD = "ppo.rewardModel.from"


def _job(base: Path, output: Path, judge: Path, plan: dict[str, Any], tuner: str = "full", **knobs: Any) -> Any:
    data = {"train": [{"from": {"inline": prompts()}}], "maxLength": 48}
    asked = {**PPO, **knobs}
    return job("ppo", base, output, {FIELD: judge}, dataset=data, training=plan, ppo=asked, **tuned(tuner))


@pytest.mark.parametrize("tuner", ["full", "lora", "qlora"])
@proves("ppo", "full", "lora", "qlora")
def test_reward_rises(base: Path, judge: Path, tmp_path: Path, tuner: str) -> None:
    ending = run(_job(base, tmp_path / "out", judge, PLAN, tuner))
    assert ending.artifact is not None
    rewards = logged(tmp_path / "out", "reward")
    assert rewards[0] < (2 if tuner == "qlora" else 1), "quantised, the base says yes more often"
    assert sum(rewards[-2:]) / 2 > 2.5
    names = {path.name for path in (tmp_path / "out/artifact").iterdir()}
    assert "ref" not in names
    assert "value_head" not in (tmp_path / "out/artifact" / _weights(tuner)).read_bytes().decode("latin1")


def _weights(tuner: str) -> str:
    return "model.safetensors" if tuner == "full" else "adapter_model.safetensors"


@pytest.mark.parametrize("tuner", ["full", "lora"])
@proves("ppo", "resume")
def test_goes_on_in_the_middle_of_a_round(base: Path, judge: Path, tmp_path: Path, tuner: str) -> None:
    """Losses, rewards and weights are the undisturbed run's, bit for bit, across epochs of the rows."""
    plan = training(maxSteps=6, perDeviceBatchSize=2, gradientAccumulationSteps=2, loggingSteps=2)
    calm, disturbed = (
        _job(base, tmp_path / name, judge, plan, tuner, numMiniBatches=2, whitenRewards=True)
        for name in ("calm", "disturbed")
    )
    run(calm)
    with pytest.raises(Fault) as left:
        run(disturbed, leave_at=4)
    assert (left.value.reason, left.value.step) == (Reason.PREEMPTED, 5)
    assert run(disturbed).from_step == 5
    for name in ("report/history.json", f"artifact/{_weights(tuner)}"):
        one, other = ((tmp_path / each / name).read_bytes() for each in ("calm", "disturbed"))
        if name.endswith("json"):
            one, other = (timeless(each) for each in (one, other))
        assert one == other, name


# ------------------------------------------------------------ formulas

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.5, 1.0], [0.2, -1.0, 9.0]])
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 7.0]])
    found, returns = advantages.estimate(rewards, values, MASK, gamma=0.9, lam=0.8)
    third = 1.0 - 0.3
    second = 0.5 + 0.9 * 0.3 - 0.2 + 0.72 * third
    first = 0.0 + 0.9 * 0.2 - 0.1 + 0.72 * second
    last = -1.0 - 0.5
    before = 0.2 + 0.9 * 0.5 - 0.4 + 0.72 * last
    wanted = torch.tensor([[first, second, third], [before, last, 0.0]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, (wanted + values) * MASK, atol=1e-5, rtol=0)


def test_rewards_of_tokens_by_hand() -> None:
    log_probs, reference = torch.tensor([[-1.0, -2.0, -3.0]] * 2), torch.tensor([[-1.5, -2.0, -2.0]] * 2)
    found = advantages.token_rewards(torch.tensor([4.0, 5.0]), log_probs, reference, MASK, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.0, 4.1], [-0.05, 5.0, 0.0]]), atol=1e-5, rtol=0)


def test_clipped_losses_by_hand() -> None:
    old = torch.zeros(4)
    log_probs = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5]))
    gains = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = advantages.policy_losses(log_probs, old, gains, cliprange=0.2)
    torch.testing.assert_close(found, torch.tensor([-1.2, -0.5, 1.5, 0.8]), atol=1e-5, rtol=0)
    values, before, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, -1.0])
    found = advantages.value_losses(values, before, returns, cliprange=0.2)
    torch.testing.assert_close(found, torch.tensor([0.5 * 1.8**2, 0.5 * 1.1**2]), atol=1e-5, rtol=0)


def test_whitened_values_have_variance_one() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    found = advantages.whiten(values, MASK, total=lambda numbers: numbers)
    inside = found[MASK.bool()]
    torch.testing.assert_close(inside.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.var(), torch.tensor(1.0), atol=1e-5, rtol=0)
    kept = advantages.whiten(values, MASK, total=lambda numbers: numbers, centre=False)
    torch.testing.assert_close(kept[MASK.bool()].mean(), torch.tensor(3.0), atol=1e-5, rtol=0)
    assert found[1, 2] == 0
