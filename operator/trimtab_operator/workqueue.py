"""Which key is looked at when: one key never runs twice at once, and a failing one waits longer each time.

add ──▶ due (deduplicated, by time) ──▶ running ──▶ done
             ▲                             │ added meanwhile
             └─────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Backoff:
    """Seconds to wait after the n-th failure in a row: doubled each time, capped, and spread by jitter."""

    first: float = 0.5
    cap: float = 120.0
    jitter: float = 0.25

    def delay(self, failures: int, chance: float) -> float:
        """The delay after this many failures; chance in [0, 1) places it within the jitter."""
        steady = min(self.cap, self.first * 2.0 ** min(failures - 1, 32))
        return steady * (1 - self.jitter + 2 * self.jitter * chance)


class WorkQueue(Generic[K]):
    """Keys with the time from which they may be looked at."""

    def __init__(
        self,
        clock: Callable[[], float],
        backoff: Backoff | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """The clock gives seconds that never go back."""
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._chance = chance
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._running: set[K] = set()
        self._again: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()
        self._moved = clock()

    def add(self, key: K, after: float = 0.0) -> None:
        """Ask for a look at the key, at the latest after this many seconds. An earlier date wins."""
        at = self._clock() + after
        if key in self._running:
            self._again[key] = min(at, self._again.get(key, at))
            return
        if key in self._due and self._due[key] <= at:
            return
        self._due[key] = at
        heapq.heappush(self._heap, (at, next(self._order), key))
        self._changed.set()

    async def get(self) -> K:
        """Wait for the next key that is due, and mark it as running."""
        while True:
            self._changed.clear()
            wait = self._until_next()
            if wait is not None and wait <= 0:
                return self._take()
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    def done(self, key: K, after: float | None = None) -> None:
        """The look at the key ended well; look again after this many seconds, if any."""
        self._failures.pop(key, None)
        self._finish(key, after)

    def failed(self, key: K) -> float:
        """The look at the key failed; it is tried again after the back-off, which is returned in seconds."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay = self._backoff.delay(self._failures[key], self._chance())
        self._again.pop(key, None)
        self._finish(key, delay)
        return delay

    @property
    def depth(self) -> int:
        """Keys that are due and not running."""
        now = self._clock()
        return sum(at <= now for at in self._due.values())

    @property
    def oldest(self) -> float:
        """Seconds that the oldest due key has waited."""
        now = self._clock()
        return max((now - at for at in self._due.values() if at <= now), default=0.0)

    @property
    def stalled(self) -> float:
        """Seconds for which keys were due and none was taken or given back. A long queue that moves is no stall."""
        return min(self.oldest, self._clock() - self._moved)

    def _until_next(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # the key was asked for at an earlier time since
        return self._heap[0][0] - self._clock() if self._heap else None

    def _take(self) -> K:
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._running.add(key)
        self._moved = self._clock()
        return key

    def _finish(self, key: K, after: float | None) -> None:
        self._running.discard(key)
        self._moved = self._clock()
        asked = self._again.pop(key, None)
        if asked is not None:
            self.add(key, max(0.0, asked - self._clock()))
        if after is not None:
            self.add(key, after)
