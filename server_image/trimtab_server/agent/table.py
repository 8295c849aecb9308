"""Which version answers under a name, and how many requests each version is answering right now.

A client's name never changes; the engine's name carries the digest. A swap is one assignment here: requests that began
before it end on the old version, which is unloaded when the last of them has ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """One version of a base or an adapter, loaded in the engine."""

    name: str
    """What clients call it."""
    engine_name: str
    """What the engine calls it."""
    digest: str | None
    """Identity of the artifact; None for a folder without a manifest."""


class Table:
    """The names that answer."""

    def __init__(self) -> None:
        self._routes: dict[str, Served] = {}
        self._running: Counter[str] = Counter()
        self._ended = asyncio.Event()

    def point(self, served: Served) -> None:
        """From now on the name means this version."""
        self._routes[served.name] = served

    def drop(self, served: Served) -> None:
        """From now on the name means nothing, unless it means another version by now."""
        if self._routes.get(served.name) is served:
            del self._routes[served.name]

    def resolve(self, name: str) -> Served | None:
        """The version that a client means: by its stable name, or by the exact version as NAME@DIGEST12."""
        found = self._routes.get(name)
        if found is None:
            found = next((each for each in self._routes.values() if each.engine_name == name), None)
        return found

    def names(self) -> Iterable[Served]:
        """Everything that answers."""
        return self._routes.values()

    @property
    def running(self) -> int:
        """Requests being answered."""
        return self._running.total()

    @contextmanager
    def use(self, served: Served) -> Iterator[None]:
        """Count a request for as long as it is being answered."""
        self._running[served.engine_name] += 1
        try:
            yield
        finally:
            self._running[served.engine_name] -= 1
            if not self._running[served.engine_name]:
                del self._running[served.engine_name]
                self._pulse()

    async def idle(self, engine_name: str | None, limit_seconds: float) -> bool:
        """Wait until no request of that version (of any, for None) runs; False when the limit passed before."""
        try:
            async with asyncio.timeout(limit_seconds):
                while self._count(engine_name):
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def _count(self, engine_name: str | None) -> int:
        return self.running if engine_name is None else self._running[engine_name]

    def _pulse(self) -> None:
        self._ended.set()
        self._ended = asyncio.Event()
