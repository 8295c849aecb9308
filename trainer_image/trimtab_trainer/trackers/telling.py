"""From progress reports to a tracker: what is new in each, told from a thread that nobody waits for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from trimtab_api.contract import ProgressReport
from trimtab_api.v1alpha1.progress import Progress
from trimtab_trainer.trackers.tracker import Tracker

log = logging.getLogger(__name__)

WAITING = 10_000
"""Reports that wait while a tracker is slow; the newest are dropped beyond it."""
FAILURES = 5
"""Failures in a row after which a tracker is left alone: it will not come back within the run, or refuses us."""
CLOSE_SECONDS = 30.0
"""Longest wait for what is still to be told when the run ends."""
_FIELDS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")
_EVALUATED = "eval_"


class Telling:
    """See progress.Reporter."""

    def __init__(self, tracker: Tracker, close_seconds: float = CLOSE_SECONDS):
        self._tracker = tracker
        self._close_seconds = close_seconds
        self._reports: queue.Queue[Progress | None] = queue.Queue(WAITING)
        self._last = Progress()
        self._begun = False
        self._failures = 0
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {tracker.place}", daemon=True)
        self._thread.start()

    def report(self, report: ProgressReport) -> None:
        """See progress.Reporter."""
        if report.progress is not None:
            self._put(report.progress)

    def close(self) -> None:
        """See progress.Reporter."""
        self._put(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            log.warning(
                "%s was not told everything: it took longer than %g s", self._tracker.place, self._close_seconds
            )

    def _put(self, progress: Progress | None) -> None:
        try:
            self._reports.put_nowait(progress)
        except queue.Full:
            if not self._dropped:
                log.warning("%s is slow: some steps are not told", self._tracker.place)
            self._dropped = True

    def _run(self) -> None:
        while (progress := self._reports.get()) is not None:
            self._try(lambda told=progress: self._tell(told))  # type: ignore[misc]
        if self._begun:
            whole = self._last.total_steps > 0 and self._last.step >= self._last.total_steps
            self._try(lambda: self._tracker.end(whole))

    def _tell(self, progress: Progress) -> None:
        if not self._begun:
            self._tracker.begin()
            self._begun = True
        values = news(self._last, progress)
        if values:
            self._tracker.log(progress.step, values)
        self._last = progress

    def _try(self, tell: Callable[[], None]) -> None:
        if self._failures >= FAILURES:
            return
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - a tracker's library raises what it likes; none of it is the run's
            self._failures += 1
            last = self._failures == FAILURES
            log.warning("%s: %s: %s%s", self._tracker.place, type(error).__name__, error, "; given up" if last else "")
        else:
            self._failures = 0


def news(before: Progress, now: Progress) -> dict[str, float]:
    """What a report tells that the one before did not: the training's numbers of a new step, evaluations that changed.

    A report holds the newest value of every name, so those of an earlier evaluation stand in it as well.
    """
    named = {name: value for name in (*_FIELDS, "eval_loss") if (value := getattr(now, name)) is not None}
    known = {name: getattr(before, name, None) for name in named} | before.metrics
    return {
        name: value
        for name, value in {**named, **now.metrics}.items()
        if (known.get(name) != value if name.startswith(_EVALUATED) else now.step > before.step)
    }
