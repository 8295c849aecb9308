"""Trying again: the one place where a failed request is repeated, with growing pauses and an end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trimtab_store.errors import ANY, StorageError, StorageUnreachable, converted

T = TypeVar("T")

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0


class Stopped(Exception):
    """The transfer that this request belongs to has ended for another reason."""


class Trouble:
    """How long one piece of work has been failing, and how long to pause before it is tried again."""

    def __init__(self, uri: str, action: str, patience: float, stop: threading.Event | None = None) -> None:
        self._uri = uri
        self._action = action
        self._patience = patience
        self._stop = stop or threading.Event()
        self._since: float | None = None
        self._pause = _FIRST_PAUSE

    def over(self) -> None:
        """Something came through: patience begins anew."""
        self._since = None
        self._pause = _FIRST_PAUSE

    def met(self, error: Exception) -> None:
        """Pause, so that the caller may try again.

        Raises the error in our words when it is not transient or patience has run out; Stopped when told to.
        """
        ours = error if isinstance(error, StorageError) else converted(error, self._uri, self._action)
        cause = None if ours is error else error
        if self._stop.is_set():
            raise Stopped from error
        if not ours.transient:
            raise ours from cause
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        # Many clients come back at once when a server does; the jitter keeps them apart.
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311
        if now + pause - self._since > self._patience:
            raise self._lost(ours, now - self._since) from cause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        if self._stop.wait(pause):
            raise Stopped from error

    def _lost(self, last: StorageError, lasted: float) -> StorageError:
        if not isinstance(last, StorageUnreachable):
            return last
        return StorageUnreachable(self._uri, f"{last.problem}, for {lasted:.0f} s", last.remedy)


def persist(call: Callable[[], T], *, uri: str, action: str, patience: float, stop: threading.Event | None = None) -> T:
    """The result of `call`, tried again after transient errors for `patience` seconds.

    `call` touches the network alone: an OSError of the local disk would be taken for one of a socket.
    """
    trouble = Trouble(uri, action, patience, stop)
    while True:
        try:
            return call()
        except ANY as error:
            trouble.met(error)
