"""Whether training moved the weights: a small sample of each trainable tensor, before and after."""

from __future__ import annotations

from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.strategies.gathering import whole

SAMPLE = 256
"""Elements of each tensor that are looked at."""


class Movement:
    """The trainable weights as they were."""

    def __init__(self, model: Any):
        self._before = {name: _sample(weight) for name, weight in _trainable(model)}
        if not self._before:
            raise Fault(
                Reason.ASSERTION_FAILED, "no weight is trainable", "Correct tuner.lora, or set tuner.type: full."
            )

    def see(self, model: Any) -> None:
        """Raise Fault(AssertionFailed) when most tensors are what they were. Every process of the run takes part."""
        now = {name: _sample(weight) for name, weight in _trainable(model)}
        moved = sum(_differ(before, now[name]) for name, before in self._before.items())
        if moved * 2 <= len(self._before):
            raise Fault(
                Reason.ASSERTION_FAILED,
                f"only {moved} of {len(self._before)} trainable tensors changed",
                "Raise training.learningRate, or keep full tuning's weights in float32. Under grpo nothing is learnt "
                "where all answers to a question earn the same: see frac_reward_zero_std in status.progress.metrics.",
            )


def _trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _differ(before: Any, now: Any) -> bool:
    """Whether they differ in the coarser of their types: a strategy may keep weights in another than they came in."""
    import torch

    return not torch.equal(before.to(now.dtype), now)


def _sample(weight: Any) -> Any:
    flat = whole(weight).reshape(-1)
    stride = max(1, flat.numel() // SAMPLE)
    return flat[::stride][:SAMPLE].to("cpu", copy=True)
