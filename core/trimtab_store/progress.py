"""How a transfer tells how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each part; an exception from it ends the transfer."""


class Meter:
    """Adds up the parts of many threads and tells them one call at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            self._progress(min(self._done, self._total), self._total)
