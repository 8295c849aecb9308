"""Whether this process was told to leave: listened for from its first moment, before anything large is imported."""

from __future__ import annotations

import signal
from types import FrameType


class Notice:
    """Whether this process was told to leave. The handler only notes it; the step that runs is finished."""

    def __init__(self) -> None:
        self.given = False

    def listen(self) -> None:
        """Note SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.given = True
