"""Wires the rooms together and runs them until the pod ends."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from trimtab_api.contract import AGENT_PORT, ENGINE_PORT, METRICS_PORT, WORK_ROOT
from trimtab_server.agent.adapters import Adapters
from trimtab_server.agent.base import BaseModel
from trimtab_server.agent.cluster import Cluster
from trimtab_server.agent.desired import Desired, follow_config_map, follow_file
from trimtab_server.agent.engine import Engine
from trimtab_server.agent.inputs import Inputs
from trimtab_server.agent.operations import drain, drain_application, metrics_application
from trimtab_server.agent.proxy import Proxy, engine_session
from trimtab_server.agent.report import ConfigMapSink, FileSink, Reporter, Sink
from trimtab_server.agent.state import State
from trimtab_server.agent.table import Table
from trimtab_server.drain import DRAIN_PORT
from trimtab_server.handoff import HANDOFF_FILE
from trimtab_store import Cache

log = logging.getLogger("trimtab.agent")

LAST_SECONDS = 25.0
"""How long running answers are waited for once the agent itself is told to end."""


@dataclass(frozen=True)
class Settings:
    """Where everything is."""

    pod_name: str
    pod_uid: str
    desired_config_map: str | None = None
    reports_config_map: str | None = None
    desired_file: Path | None = None
    report_file: Path | None = None
    work: Path = Path(WORK_ROOT)
    handoff: Path = Path(HANDOFF_FILE)
    host: str = "0.0.0.0"  # noqa: S104 - the Service reaches the pod by its own address
    port: int = AGENT_PORT
    metrics_port: int = METRICS_PORT
    drain_port: int = DRAIN_PORT
    engine_url: str = f"http://127.0.0.1:{ENGINE_PORT}"


class Agent:
    """One agent, from start to end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changed = asyncio.Event()
        self._reporter: Reporter | None = None
        self._seen: tuple[int, frozenset[str]] = (0, frozenset())
        self.stop = asyncio.Event()
        """Set to end the agent in order."""
        self.state: State | None = None
        """What the pod is; None before `run`."""

    async def run(self) -> None:
        """Serve until told to stop. Raises what a room did not foresee; the kubelet then starts the agent again."""
        async with AsyncExitStack() as stack:
            state, cluster = await self._build(stack)
            self.state = state
            await self._listen(stack, state)
            self._reporter = Reporter(self._sink(cluster), lambda: state.report(self._settings.pod_uid))
            stack.push_async_callback(self._reporter.withdraw)
            async with asyncio.TaskGroup() as group:
                rooms = [
                    group.create_task(self._follow(state.desired, cluster), name="desired"),
                    group.create_task(state.base.establish(state.desired), name="base"),
                    group.create_task(state.engine.watch(), name="engine"),
                    group.create_task(state.adapters.failed(), name="adapters"),
                    group.create_task(self._steer(state), name="steer"),
                    group.create_task(self._reporter.run(), name="report"),
                ]
                await self.stop.wait()
                await drain(state, 0, LAST_SECONDS)
                for room in rooms:
                    room.cancel()
            await state.adapters.close()

    async def _build(self, stack: AsyncExitStack) -> tuple[State, Cluster | None]:
        settings = self._settings
        cluster = None
        if settings.desired_file is None or settings.report_file is None:
            cluster = Cluster.of_this_pod()
            stack.push_async_callback(cluster.close)
        administration = await stack.enter_async_context(aiohttp.ClientSession())
        cache = await asyncio.to_thread(Cache, settings.work / "cache")
        inputs = Inputs(cache, settings.work / "hub")
        table = Table()
        engine = Engine(administration, settings.engine_url, self._notify)
        base = BaseModel(inputs, settings.handoff, self._notify)
        adapters = Adapters(inputs, engine, table, base, self._notify)
        return State(Desired(self._notify), base, engine, table, adapters), cluster

    async def _listen(self, stack: AsyncExitStack, state: State) -> None:
        settings = self._settings
        session = await stack.enter_async_context(engine_session())
        doors = (
            (Proxy(state, session).application(), settings.host, settings.port),
            (metrics_application(state), settings.host, settings.metrics_port),
            (drain_application(state), "127.0.0.1", settings.drain_port),
        )
        for application, host, port in doors:
            await stack.enter_async_context(_served(application, host, port))

    async def _follow(self, desired: Desired, cluster: Cluster | None) -> None:
        settings = self._settings
        if settings.desired_file is not None:
            await follow_file(desired, settings.desired_file)
        else:
            assert cluster is not None
            assert settings.desired_config_map is not None
            await follow_config_map(desired, cluster, settings.desired_config_map)

    def _sink(self, cluster: Cluster | None) -> Sink:
        settings = self._settings
        if settings.report_file is not None:
            return FileSink(settings.report_file)
        assert cluster is not None
        assert settings.reports_config_map is not None
        return ConfigMapSink(cluster, settings.reports_config_map, settings.pod_name)

    async def _steer(self, state: State) -> None:
        """After each change: tell the parts what the others have learnt."""
        while True:
            self._changed.clear()
            if state.base.served is not None and state.engine.base_name is None:
                state.engine.base_name = state.base.served.engine_name
                state.engine.poll_soon()
            if state.desired.now is not None:
                state.adapters.apply(state.desired.now)
            seen = (state.engine.generation, state.engine.names)
            if seen != self._seen:
                self._seen = seen
                state.adapters.wake()
            state.observe()
            state.adapters.sweep()
            if self._reporter is not None:
                self._reporter.changed()
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()


@asynccontextmanager
async def _served(application: web.Application, host: str, port: int) -> AsyncIterator[None]:
    # Without handler_cancellation a client that goes away would leave the engine generating for nobody.
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()


async def run(settings: Settings) -> None:
    """Run one agent until SIGTERM or SIGINT."""
    agent = Agent(settings)
    loop = asyncio.get_running_loop()
    ending: Callable[[], None] = agent.stop.set
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ending)
    await agent.run()
