"""rewardModel: held-out pairs are ranked, the loss is Bradley and Terry's, a run that was cut goes on exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation
from tests.unit.trainer.heads.conftest import FULL, LORA, NOUNS, Rows, Tune, said
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scalar
from trimtab_trainer.notice import Notice

BETTER, WORSE = ("good", "bright"), ("bad", "fog")


def compared(count: int, seed: int) -> Rows:
    """An answer with a good word is better than one with a bad word."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        question = said(draw, draw.choice(NOUNS[:6]), length=4)
        good, bad = said(draw, draw.choice(BETTER), length=5), said(draw, draw.choice(WORSE), length=5)
        rows.append({**conversation(question, good), "rejected_response": bad})
    return rows


@proves("rewardModel", "full", "lora")
@pytest.mark.parametrize("tuner", [FULL, LORA], ids=["full", "lora"])
def test_held_out_pairs_are_ranked(tune: Tune, local: LocalModel, tuner: dict[str, Any]) -> None:
    held_out = compared(80, 2)
    done = tune(
        "rewardModel",
        compared(320, 1),
        held_out,
        rewardModel={"centerRewardsCoefficient": 0.01},
        training={"maxSteps": 30, "learningRate": 5e-3},
        **tuner,
    )
    assert done.held_out["accuracy"] > 0.9
    assert done.held_out["margin"] > 1
    published = LocalModel(done.folder, "s3://models/reward", None, base=local if tuner is LORA else None)
    judge = scalar.open_published(published, "ppo.rewardModel", torch.float32)
    chosen = judge([row["messages"] for row in held_out])[:, 0]
    rejected = judge(
        [[*row["messages"][:-1], {"role": "assistant", "content": row["rejected_response"]}] for row in held_out]
    )[:, 0]
    assert float((chosen > rejected).float().mean()) >= 0.9
    assert abs(float((chosen + rejected).mean())) < float((chosen - rejected).mean())


def test_the_loss_is_bradley_and_terrys(tune: Tune, base: Path, local: LocalModel) -> None:
    """The first logged loss of a run is -log σ(r₊ - r₋) + c·(r₊ + r₋)² of the untrained model on the first rows."""
    rows = compared(32, 1)
    done = tune(
        "rewardModel",
        rows,
        rewardModel={"centerRewardsCoefficient": 0.5},
        dataset={"shuffle": False},
        training={"maxSteps": 2, "learningRate": 1e-4},
        **FULL,
    )
    model = scalar.load(local, "base", torch.float32, labels=1, seed=42, pad_token_id=0).eval()
    text = scalar.tokenizers.load(base, "base")

    def reward(messages: list[dict[str, Any]]) -> torch.Tensor:
        ids = text.apply_chat_template(messages, return_dict=True)["input_ids"]
        return scalar.score_ids(model, [ids])[0, 0]

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row in rows[:16]:
            worse = [*row["messages"][:-1], {"role": "assistant", "content": row["rejected_response"]}]
            yield reward(row["messages"]), reward(worse)

    terms = [-logsigmoid(good - bad) + 0.5 * (good + bad) ** 2 for good, bad in pairs()]
    assert done.losses()[0] == pytest.approx(float(torch.stack(terms).mean()), abs=1e-5)


class After(Notice):
    """Says that the process was told to leave, once it was asked so often."""

    def __init__(self, asked: int):
        self._left = asked

    @property
    def given(self) -> bool:  # type: ignore[override]
        """Whether it is time."""
        self._left -= 1
        return self._left < 0


@proves("rewardModel", "resume")
def test_a_run_that_was_cut_goes_on_exactly(tune: Tune) -> None:
    fields: dict[str, Any] = {"training": {"maxSteps": 8, "learningRate": 5e-3}, **LORA}
    calm = tune("rewardModel", compared(128, 1), name="calm", **fields)
    with pytest.raises(Fault, match="told to leave"):
        tune("rewardModel", compared(128, 1), name="cut", notice=After(4), **fields)
    resumed = tune("rewardModel", compared(128, 1), name="cut", **fields)
    assert 0 < (resumed.ending.from_step or 0) < 8
    assert resumed.losses() == calm.losses()
    weights = "artifact/adapter_model.safetensors"
    assert (resumed.output / weights).read_bytes() == (calm.output / weights).read_bytes()
