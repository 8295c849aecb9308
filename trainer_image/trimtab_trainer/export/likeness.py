"""How far a quantised model's answers are from those of the model that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

ROWS, LENGTH = 4, 256
"""How much is looked at: rows, and tokens of each."""
LIMIT = 1.0
"""Largest mean divergence that is published, in nats a token: beyond it another model answers."""


@dataclass(frozen=True)
class Likeness:
    """The verdict, for the manifest and the message."""

    divergence: float
    """Kullback-Leibler divergence of the next-token distributions from the original, mean over tokens, in nats."""
    agreement: float
    """Share of tokens whose likeliest successor stayed the same."""

    def document(self) -> dict[str, float]:
        """For the manifest."""
        return {"divergence": round(self.divergence, 6), "agreement": round(self.agreement, 4)}


def compare(original: Path, quantised: Path, rows: Sequence[list[int]]) -> Likeness:
    """Run both models over the same rows, one after the other, so that one of them is in memory at a time.

    Raises Fault(AssertionFailed) when the quantised one answers something else altogether.
    """
    import torch

    looked_at = [row[:LENGTH] for row in rows[:ROWS]]
    before, after = _logits(original, looked_at), _logits(quantised, looked_at)
    divergence, agreement, tokens = 0.0, 0.0, 0
    for one, other in zip(before, after, strict=True):
        log_one, log_other = one.log_softmax(-1), other.log_softmax(-1)
        divergence += float((log_one.exp() * (log_one - log_other)).sum())
        agreement += float((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += one.shape[0]
    found = Likeness(divergence / tokens, agreement / tokens)
    if not torch.isfinite(torch.tensor(found.divergence)) or found.divergence > LIMIT:
        raise Fault(
            Reason.ASSERTION_FAILED,
            f"the quantised model diverges from the original by {found.divergence:.3g} nats a token (limit {LIMIT})",
            "Take scheme fp8 or int8, a smaller quantize.groupSize, or calibration rows like those of its use.",
        )
    return found


def _logits(folder: Path, rows: Sequence[list[int]]) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
