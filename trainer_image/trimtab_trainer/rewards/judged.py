"""Rewards that a model gives: whole conversations, written with the judge's own template and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scalar
from trimtab_trainer.rewards import Said


class Judged:
    """A reward model as a reward."""

    def __init__(self, judge: scalar.Judge):
        self._judge = judge

    @classmethod
    def open(cls, local: LocalModel, field: str, dtype: Any, device: Any = None) -> Judged:
        """The published reward model that `field` names.

        Raises Fault(ModelInvalid) when it does not open, or gives more than one number.
        """
        judge = scalar.open_published(local, field, dtype)
        outputs = int(judge.model.config.num_labels)
        if outputs != 1:
            raise Fault(
                Reason.MODEL_INVALID,
                f"{field} {local.reference} gives {outputs} numbers; a reward is one",
                "Name what a FineTuneJob of method rewardModel made.",
            )
        if device is not None:
            judge.model.to(device)
        return cls(judge)

    def __call__(self, said: Sequence[Said]) -> Sequence[float]:
        """The head's output for each conversation with its answer."""
        whole = [[*each.messages, {"role": "assistant", "content": each.text}] for each in said]
        scores: list[float] = self._judge(whole)[:, 0].tolist()
        return scores
