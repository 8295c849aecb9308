"""Threads that work through one list of parts together: in order, in bounded memory, one failure ending all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from trimtab_store.patience import Stopped

P = TypeVar("P")

TURN = 1.0
"""Seconds after which a waiting thread looks whether the work has been stopped."""


class Gang(Generic[P]):
    """A few threads and the parts that they take, each thread one at a time, in the order of the list.

    `work(part)` is called for each. The first exception stops the others and is raised by `run`. As parts are
    taken in order, the holder of the earliest one never waits for a later one: turns cannot deadlock.
    """

    def __init__(self, threads: int, work: Callable[[P], None]) -> None:
        self._threads = threads
        self._work = work
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self.stop = threading.Event()
        """Set when the work has been given up."""

    def run(self, parts: Iterable[P]) -> None:
        """Work through the parts; returns when all are done."""
        source = iter(parts)
        names = [f"trimtab-store-{number}" for number in range(self._threads)]
        threads = [threading.Thread(target=self._loop, args=(source,), name=name, daemon=True) for name in names]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            # A signal's exception reaches the caller's thread alone; the others must not go on behind its back.
            self.stop.set()
            for thread in threads:
                thread.join()
            raise
        if self._failure is not None:
            raise self._failure

    def _loop(self, source: Iterator[P]) -> None:
        try:
            while not self.stop.is_set():
                with self._lock:
                    part = next(source)
                self._work(part)
        except (StopIteration, Stopped):
            return
        except BaseException as error:  # noqa: BLE001 - raised again by run
            with self._lock:
                self._failure = self._failure or error
            self.stop.set()


class OrderedDigest:
    """sha256 over parts that come from several threads: each waits until the ones before it are in."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._digest = hashlib.sha256()
        self._next = 0
        self._turn = threading.Condition()

    def feed(self, offset: int, data: bytes | bytearray | memoryview[Any]) -> None:
        """Take in the bytes that begin at `offset`. Raises Stopped when the work is given up meanwhile."""
        with self._turn:
            while self._next != offset:
                if self._stop.is_set():
                    raise Stopped
                self._turn.wait(TURN)
        # Only the holder of the turn comes here, so that hashing needs no lock.
        self._digest.update(data)
        with self._turn:
            self._next = offset + len(data)
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """The digest of what was fed."""
        return self._digest.hexdigest()
