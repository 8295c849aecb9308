"""Ending a run early, when what it learns no longer helps on the validation rows.

What is known is read from the trainer's history, which is part of every checkpoint: a resumed run counts as the
undisturbed one would have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trimtab_api.v1alpha1.training import EarlyStopping

log = logging.getLogger(__name__)


def stale(history: Sequence[dict[str, Any]], threshold: float) -> int:
    """Evaluations at the end of a history that did not better the best loss before them by `threshold`."""
    best, count = float("inf"), 0
    for entry in history:
        if "eval_loss" not in entry:
            continue
        better = entry["eval_loss"] < best - threshold
        best, count = (entry["eval_loss"], 0) if better else (best, count + 1)
    return count


def is_over(asked: EarlyStopping | None, checkpoint: Path) -> bool:
    """Whether a run was stopped at this checkpoint."""
    if asked is None:
        return False
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return stale(history, asked.threshold) >= asked.patience


class StopEarly(TrainerCallback):
    """Stops, and saves the step, when the loss has been stale for long enough."""

    def __init__(self, asked: EarlyStopping):
        self._asked = asked

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every process has the same loss here, so that all of them stop."""
        if stale(state.log_history, self._asked.threshold) >= self._asked.patience:
            log.info("the validation loss has not fallen for %d evaluations: ending", self._asked.patience)
            control.should_training_stop = control.should_save = True
