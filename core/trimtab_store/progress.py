"""How a transfer tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each part; an exception from it ends the transfer."""
