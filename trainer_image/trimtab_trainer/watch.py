"""From the trainer's log lines to progress reports: loss, speed, time that is left."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from transformers import TrainerCallback

from trimtab_api.conditions import Reason
from trimtab_api.contract import ProgressReport
from trimtab_api.v1alpha1.progress import Progress
from trimtab_trainer.checkpoint import Keeper
from trimtab_trainer.distributed import Group
from trimtab_trainer.endings import Fault
from trimtab_trainer.progress import Reporter, eta_text, now_text
from trimtab_trainer.report import metrics

log = logging.getLogger(__name__)

METRICS_KEPT = 32
"""Names that a status holds."""
NAME_LIMIT = 64
"""Longest name, in characters."""


class Watch(TrainerCallback):
    """Reports at each log line, evaluation and checkpoint; stops a run whose loss is no number."""

    def __init__(self, reporter: Reporter, group: Group, keeper: Keeper, attempt: int, from_step: int):
        self._reporter = reporter
        self._group = group
        self._keeper = keeper
        self._attempt = attempt
        self._from_step = from_step
        self._progress = Progress()
        self._began = (time.monotonic(), from_step)
        self._last = (time.monotonic(), 0)
        self.speeds: list[float] = []
        """Tokens per second between two log lines, of all processes."""
        self.trainer: Any = None
        """Set once the trainer exists; it counts the tokens."""

    @property
    def step(self) -> int:
        """The last step that was reported."""
        return self._progress.step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say where the run begins."""
        self._began = (time.monotonic(), int(state.global_step))
        self._last = (time.monotonic(), int(self.trainer.tokens_seen))
        self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take over what was logged. Raises Fault(AssertionFailed) when the loss is not finite."""
        logs = logs or {}
        if "loss" in logs:
            self._see_finite(state.global_step, logs["loss"])
            tokens = self._group.total(int(self.trainer.tokens_seen))
            now = time.monotonic()
            speed = (tokens - self._last[1]) / max(now - self._last[0], 1e-9)
            self._last = (now, tokens)
            self.speeds.append(speed)
            self._take(logs)
            self._tell(
                state,
                loss=logs["loss"],
                learning_rate=logs.get("learning_rate"),
                grad_norm=_finite(logs.get("grad_norm")),
                tokens_per_second=round(speed, 1),
            )
        elif "eval_loss" in logs:
            self._take(logs)
            self._tell(state, eval_loss=_finite(logs["eval_loss"]))
        elif any(name.startswith("eval_") for name in logs):
            self._take(logs, first=True)
            self._tell(state)

    def answered(self, state: Any, done: int, total: int) -> None:
        """Tell that an evaluation gets on: it takes no step, and who is silent for long is taken to hang."""
        log.info("%d of %d rows are answered", done, total)
        self._tell(state)

    def _take(self, logs: dict[str, float], first: bool = False) -> None:
        """Remember what is logged beside the fields of Progress: the names that were there first, or before them."""
        found = {
            name[:NAME_LIMIT]: _short(value)
            for name, value in metrics(logs).items()
            if name not in Progress.model_fields
        }
        before = {name: value for name, value in self._progress.metrics.items() if name not in found}
        known = {**found, **before} if first else {**self._progress.metrics, **found}
        self._progress = self._progress.model_copy(update={"metrics": dict(list(known.items())[:METRICS_KEPT])})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell of the checkpoint."""
        self._tell(state)

    def _tell(self, state: Any, **values: float | None) -> None:
        step, total = int(state.global_step), int(state.max_steps)
        left = self._seconds_left(step, total)
        self._progress = self._progress.model_copy(
            update={
                "step": step,
                "total_steps": total,
                "steps": f"{step}/{total}",
                "epoch": None if state.epoch is None else round(float(state.epoch), 4),
                "eta_seconds": None if left is None else round(left),
                "eta": None if left is None else eta_text(left),
                "updated_time": now_text(),
                **{name: _readable(value) for name, value in values.items()},
            }
        )
        if self._group.place.first:
            self._reporter.report(
                ProgressReport(
                    attempt=self._attempt,
                    progress=self._progress,
                    from_step=self._from_step,
                    checkpoints=self._keeper.complete[:16],
                )
            )

    def _seconds_left(self, step: int, total: int) -> float | None:
        began, first = self._began
        return (time.monotonic() - began) / (step - first) * (total - step) if step > first else None

    @staticmethod
    def _see_finite(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise Fault(
                Reason.ASSERTION_FAILED,
                f"the loss is {loss} at step {step}",
                "Lower training.learningRate, set training.maxGradNorm, or set model.dtype: float32.",
                step=step,
            )


def _readable(value: float | None) -> float | None:
    """Five significant digits: what a person reads in a column, and more than a loss is good for."""
    return value if value is None else _short(value)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
