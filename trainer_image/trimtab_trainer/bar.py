"""A progress bar at a terminal: step, loss, time that is left. Plain lines where there is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab_api.contract import ProgressReport


class BarReporter:
    """See progress.Reporter."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("step {task.fields[steps]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("ETA {task.fields[eta]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=None, steps="-", loss="-", eta="-")
        self._last_step = -1
        if self._console.is_terminal:
            self._bar.start()

    def report(self, report: ProgressReport) -> None:
        """See progress.Reporter."""
        progress = report.progress
        if progress is None:
            return
        loss = "-" if progress.loss is None else f"{progress.loss:.4f}"
        eta = progress.eta or "-"
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                total=progress.total_steps,
                completed=progress.step,
                steps=progress.steps,
                loss=loss,
                eta=eta,
            )
        elif progress.step != self._last_step:
            self._console.print(f"step {progress.steps}  loss {loss}  ETA {eta}", highlight=False)
        self._last_step = progress.step

    def close(self) -> None:
        """See progress.Reporter."""
        self._bar.stop()
