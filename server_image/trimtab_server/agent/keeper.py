"""Keeps one adapter in the engine: fetched, checked, loaded, pointed to; again after every restart of the engine.

Each adapter has a keeper of its own, so that one that fails, or is slow, fails alone. A new version is loaded beside
the old one; the name moves; the old one is unloaded when its last request has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from trimtab_api.conditions import Reason
from trimtab_api.contract import AgentAdapter, ModelInput
from trimtab_server.agent import backoff, checks
from trimtab_server.agent.engine import Engine
from trimtab_server.agent.failure import Unservable
from trimtab_server.agent.inputs import Fetched, Inputs
from trimtab_server.agent.table import Served, Table
from trimtab_server.handoff import versioned

log = logging.getLogger("trimtab.agent.keeper")


@dataclass(frozen=True)
class Version:
    """One version of an adapter on the local disk, checked."""

    source: ModelInput
    """The wish that it fulfils."""
    max_lora_rank: int
    """The room that it was checked against."""
    served: Served
    fetched: Fetched

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return self.served.engine_name


@dataclass(frozen=True)
class Surroundings:
    """What all keepers share."""

    inputs: Inputs
    engine: Engine
    table: Table
    facts: checks.Base
    on_change: Callable[[], None]
    retire: Callable[[Version], None]
    """Unloads a version once nobody uses it, in the background."""


class Keeper:
    """One name of the desired state."""

    def __init__(self, name: str, source: ModelInput, max_lora_rank: int, around: Surroundings) -> None:
        self.name = name
        self.failure: Unservable | None = None
        """Why the version wanted does not answer."""
        self.serving: Version | None = None
        """What answers under the name, or did before the engine started again."""
        self._source = source
        self._max_lora_rank = max_lora_rank
        self._around = around
        self._candidate: Version | None = None
        self._tries = 0
        self._tried_generation = 0
        self._wake = asyncio.Event()

    def want(self, source: ModelInput, max_lora_rank: int) -> None:
        """Take a new wish under the same name."""
        if (source, max_lora_rank) != (self._source, self._max_lora_rank):
            self._source, self._max_lora_rank = source, max_lora_rank
            self._tries = 0
            self.failure = None
            self._wake.set()

    def wake(self) -> None:
        """The engine is not as it was: compare again.

        What failed in this very start of the engine waits for its own time: its tries are counted.
        """
        lost = self.serving is not None and not self._is_in(self.serving)
        if self.failure is None or lost or self._tried_generation != self._around.engine.generation:
            self._wake.set()

    @property
    def holds(self) -> frozenset[str]:
        """The engine's names that belong to this keeper."""
        return frozenset(each.engine_name for each in (self.serving, self._candidate) if each is not None)

    @property
    def loaded(self) -> bool:
        """Whether the version wanted answers now."""
        return self.failure is None and self._is_wanted(self.serving) and self._is_in(self.serving)

    @property
    def settled(self) -> bool:
        """Whether it is in, or has definitely failed: what a pod's first readiness waits for."""
        if self.failure is None:
            return self.loaded
        lost = self.serving is not None and not self._is_in(self.serving)
        return not lost and backoff.definite(self._tries, self.failure.transient)

    def report(self) -> AgentAdapter:
        """What the operator is told."""
        answering = self.serving is not None and self._is_in(self.serving)
        digest = self.serving.served.digest if self.serving is not None and answering else None
        if self.failure is not None:
            return AgentAdapter(
                name=self.name, digest=digest, reason=self.failure.reason, message=self.failure.message[:1024]
            )
        return AgentAdapter(name=self.name, digest=digest, reason=Reason.LOADED if self.loaded else Reason.LOADING)

    async def run(self) -> None:
        """Keep it for ever; cancelled when the name is no longer wanted."""
        while True:
            self._wake.clear()
            await self._wait(await self._round())

    def leave(self) -> None:
        """Take the name out of service; called once `run` has ended, when the name is no longer wanted."""
        self._let_go(self._candidate)
        if self.serving is not None:
            self._around.table.drop(self.serving.served)
            self._around.retire(self.serving)
        self.serving = self._candidate = None
        self._around.on_change()

    async def _round(self) -> float | None:
        """Go one way towards the wish; returns seconds until the next try, None when only a change gives work."""
        wish = (self._source, self._max_lora_rank)
        try:
            await self._advance()
        except Unservable as failure:
            if wish != (self._source, self._max_lora_rank):
                return 0.0
            self._tries += 1
            self._fail(failure)
            return backoff.pause(self._tries, failure.transient)
        self._tries = 0
        return None

    async def _advance(self) -> None:
        engine = self._around.engine
        self._tried_generation = engine.generation
        try:
            version = await self._prepared()
        except Unservable:
            if self.serving is not None and engine.answers:
                await self._ensure(self.serving)
            raise
        if engine.answers:
            await self._ensure(version)

    async def _prepared(self) -> Version:
        """The wanted version on the disk, checked; at once when it is there already."""
        for known in (self._candidate, self.serving):
            if known is not None and self._is_wanted(known):
                return known
        source, room = self._source, self._max_lora_rank
        fetched = await self._around.inputs.fetch(source, "adapter")
        try:
            await asyncio.to_thread(checks.check_adapter, self.name, fetched, self._around.facts, room)
        except BaseException:
            fetched.release()
            raise
        self._let_go(self._candidate)
        served = Served(self.name, versioned(self.name, fetched.digest), fetched.digest)
        self._candidate = Version(source, room, served, fetched)
        return self._candidate

    async def _ensure(self, version: Version) -> None:
        """See that the engine has the version, and let the name mean it."""
        around = self._around
        # Under the lock, so that a retirement of the same version cannot come between the look and the pointing.
        async with around.engine.lock(version.engine_name):
            if version.engine_name not in around.engine.names:
                log.info("loading %s", version.engine_name)
                await around.engine.load(version.engine_name, str(version.fetched.path))
            self._point(version)

    def _point(self, version: Version) -> None:
        old, self.serving = self.serving, version
        if version is self._candidate:
            self._candidate = None
        self._around.table.point(version.served)
        if old is not None and old is not version:
            if old.engine_name == version.engine_name:
                old.fetched.release()
            else:
                self._around.retire(old)
        if self._is_wanted(version):
            self.failure = None
        self._around.on_change()

    def _fail(self, failure: Unservable) -> None:
        if self.failure is None or self.failure.message != failure.message:
            log.warning("adapter %s: %s: %s", self.name, failure.reason, failure.message)
        self.failure = failure
        self._around.on_change()

    def _let_go(self, version: Version | None) -> None:
        """Give up a version that was never pointed to; the sweep unloads it if the engine took it all the same."""
        if version is not None:
            version.fetched.release()

    def _is_wanted(self, version: Version | None) -> bool:
        wish = (self._source, self._max_lora_rank)
        return version is not None and (version.source, version.max_lora_rank) == wish

    def _is_in(self, version: Version | None) -> bool:
        return version is not None and version.engine_name in self._around.engine.names

    async def _wait(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
