"""The set of keepers: one for each adapter wanted, and the quiet removal of what nobody wants any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import AgentAdapter, ServeConfig
from trimtab_server.agent.base import BaseModel
from trimtab_server.agent.engine import Engine
from trimtab_server.agent.inputs import Inputs
from trimtab_server.agent.keeper import Keeper, Surroundings, Version
from trimtab_server.agent.table import Table

log = logging.getLogger("trimtab.agent.adapters")

RETIRE_SECONDS = 600.0
"""How long a version that is no longer wanted stays for the requests that still use it."""
UNLOAD_TRIES = 3


class Adapters:
    """All adapters of this pod."""

    def __init__(
        self, inputs: Inputs, engine: Engine, table: Table, base: BaseModel, on_change: Callable[[], None]
    ) -> None:
        self._inputs = inputs
        self._engine = engine
        self._table = table
        self._base = base
        self._on_change = on_change
        self._config: ServeConfig | None = None
        self._keepers: dict[str, tuple[Keeper, asyncio.Task[None]]] = {}
        self._ending: set[Keeper] = set()
        self._leaving: dict[asyncio.Task[None], str] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def failed(self) -> None:
        """Wait until a keeper or a retirement ends by an error that nobody foresaw, and raise it."""
        await self._failed

    def apply(self, config: ServeConfig) -> None:
        """Start keepers for new names, tell the others their wish, end those of names that are gone."""
        if config is self._config or self._base.facts is None:
            return
        self._config = config
        wanted = {each.name: each.source for each in config.adapters if not self._is_base(each.name)}
        for name in self._keepers.keys() - wanted.keys():
            self._end(name)
        for name, source in wanted.items():
            if name in self._keepers:
                self._keepers[name][0].want(source, config.max_lora_rank)
            else:
                self._begin(Keeper(name, source, config.max_lora_rank, self._surroundings()))

    def wake(self) -> None:
        """The engine is not as it was."""
        for keeper, _ in self._keepers.values():
            keeper.wake()

    def find(self, name: str) -> Keeper | None:
        """The keeper of a name."""
        return self._keepers[name][0] if name in self._keepers else None

    @property
    def settled(self) -> bool:
        """Whether every adapter wanted is in, or has definitely failed."""
        return self._config is not None and all(keeper.settled for keeper, _ in self._keepers.values())

    def reports(self) -> list[AgentAdapter]:
        """Each adapter wanted, in the order of the spec."""
        return [self._report(each.name) for each in self._config.adapters] if self._config else []

    def sweep(self) -> None:
        """Unload what the engine has and nobody here knows: left by an earlier life of this agent."""
        if not self.settled or not self._engine.answers:
            return
        ending = frozenset().union(*(keeper.holds for keeper in self._ending))
        known = self._held() | ending | set(self._leaving.values()) | {self._engine.base_name}
        for stray in self._engine.names - known:
            log.info("unloading %s, which nobody wants", stray)
            self._start(self._unload(stray), stray)

    async def close(self) -> None:
        """End all keepers and retirements; the engine is left as it is."""
        tasks = [task for _, task in self._keepers.values()] + list(self._leaving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._failed.cancel()

    def _begin(self, keeper: Keeper) -> None:
        task = asyncio.create_task(keeper.run(), name=f"keeper {keeper.name}")
        task.add_done_callback(self._watch)
        self._keepers[keeper.name] = (keeper, task)

    def _end(self, name: str) -> None:
        keeper, task = self._keepers.pop(name)
        self._ending.add(keeper)
        task.cancel()
        # Only when the keeper stands still is it known what it holds.
        task.add_done_callback(lambda _: self._ended(keeper))

    def _ended(self, keeper: Keeper) -> None:
        keeper.leave()
        self._ending.discard(keeper)

    def _retire(self, version: Version) -> None:
        self._start(self._retirement(version), version.engine_name)

    async def _retirement(self, version: Version) -> None:
        await self._table.idle(version.engine_name, RETIRE_SECONDS)
        await self._unload(version.engine_name)
        version.fetched.release()

    async def _unload(self, engine_name: str) -> None:
        async with self._engine.lock(engine_name):
            for attempt in range(UNLOAD_TRIES):
                if engine_name in self._held() or engine_name not in self._engine.names:
                    return
                if await self._engine.unload(engine_name):
                    log.info("unloaded %s", engine_name)
                    return
                await asyncio.sleep(2.0**attempt)
        log.warning("the engine did not unload %s; it is tried again with the next change", engine_name)

    def _start(self, work: Coroutine[Any, Any, None], engine_name: str) -> None:
        task = asyncio.create_task(work, name=f"unload {engine_name}")
        self._leaving[task] = engine_name
        task.add_done_callback(self._leaving.pop)
        task.add_done_callback(self._watch)

    def _watch(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    def _held(self) -> frozenset[str]:
        return frozenset().union(*(keeper.holds for keeper, _ in self._keepers.values()))

    def _is_base(self, name: str) -> bool:
        return self._base.served is not None and self._base.served.name == name

    def _surroundings(self) -> Surroundings:
        assert self._base.facts is not None
        return Surroundings(self._inputs, self._engine, self._table, self._base.facts, self._on_change, self._retire)

    def _report(self, name: str) -> AgentAdapter:
        keeper = self.find(name)
        if keeper is not None:
            return keeper.report()
        return AgentAdapter(
            name=name,
            reason=Reason.SPEC_INVALID,
            message=f"adapters[{name}]: the base has the same name, so clients could not tell them apart; "
            "rename one of them",
        )
