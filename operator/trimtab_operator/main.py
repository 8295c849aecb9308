"""The operator's process: watches, queue, workers, a slow resync, and the two ports by which others judge it.

python -m trimtab_operator.main --settings /etc/trimtab/settings.json
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import generate_latest

from trimtab_operator import finetunejob, mergejob, metrics, modeldeployment, settings, triggers
from trimtab_operator.kube import Kube, KubeError, Stale
from trimtab_operator.plan import Key
from trimtab_operator.reconcile import Clock, Kind, reconcile, rests, utc
from trimtab_operator.settings import Settings
from trimtab_operator.survey import Survey
from trimtab_operator.workqueue import Backoff, WorkQueue

log = logging.getLogger("trimtab")

HEALTH_PORT = 8080
METRICS_PORT = 9090
STUCK_SECONDS = 120.0
"""Keys that are due while none is looked at for longer than this show that nobody works."""
SETTLING_SECONDS = 0.2
"""The watches list what there is at nearly the same time: one survey is for all of them."""


class Operator:
    """The workers around one queue."""

    def __init__(self, chosen: Settings, kube: Kube, clock: Clock = utc) -> None:
        """Nothing runs until run() is awaited. The clock is what decisions are made by."""
        self.settings = chosen
        self.kube = kube
        self.clock = clock
        self.queue: WorkQueue[Key] = WorkQueue(time.monotonic)
        self.states = metrics.States()
        self.relisted = asyncio.Event()
        rooms = (finetunejob.kind(chosen), mergejob.kind(chosen), modeldeployment.kind(chosen))
        self.kinds: Mapping[str, Kind[Any]] = {room.name: room for room in rooms}

    async def run(self, health_port: int, metrics_port: int) -> None:
        """Work until one of the parts ends; the others are ended with it, and its error is raised."""
        servers = await self._serve(health_port, metrics_port)
        watching = kopf.operator(
            registry=triggers.registry(self.queue.add, self.relisted.set, self.states),
            standalone=True,
            clusterwide=not self.settings.namespaces,
            namespaces=self.settings.namespaces,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                parts = [tasks.create_task(self.work()) for _ in range(self.settings.workers)]
                parts.append(tasks.create_task(self.resync()))
                await watching  # ends on SIGTERM
                for part in parts:
                    part.cancel()
        finally:
            for server in servers:
                await server.cleanup()

    async def work(self) -> None:
        """Look at one key after the other."""
        while True:
            key = await self.queue.get()
            started = time.monotonic()
            result = await self.look(key)
            metrics.RECONCILE_SECONDS.labels(key.kind, result).observe(time.monotonic() - started)

    async def look(self, key: Key) -> str:
        """One look at one key; how it went."""
        try:
            again = await reconcile(self.kinds[key.kind], key, self.kube, self.clock)
        except Stale as error:
            log.debug("%s: %s", key, error)
            self.queue.done(key, after=0.1)
            return "stale"
        except KubeError as error:
            log.warning("%s: %s; again in %.1f s", key, error, self.queue.failed(key))
            return "error"
        except Exception:
            log.exception("%s: this is a fault of the operator; again in %.1f s", key, self.queue.failed(key))
            return "fault"
        self.queue.done(key, after=again)
        return "ok"

    async def resync(self) -> None:
        """Survey everything when a watch begins and from time to time: what no event told is found so."""
        backoff, failures = Backoff(first=1.0, cap=30.0), 0
        while True:
            wait = backoff.delay(failures, chance=0.5) if failures else self.settings.resync_seconds
            try:
                await asyncio.wait_for(self.relisted.wait(), wait)
                await asyncio.sleep(SETTLING_SECONDS)
            except TimeoutError:
                log.debug("nothing was listed anew for %.0f s", wait)
            self.relisted.clear()
            try:
                await self.survey()
                failures = 0
            except KubeError as error:
                failures += 1
                log.warning("survey: %s", error)

    async def survey(self) -> None:
        """Ask for a look at every key for which there is something to do. Raises KubeError."""
        survey = await Survey.take(self.kube, self.settings.namespaces)
        for key in survey.resources():
            started = time.monotonic()
            try:
                rest = await rests(self.kinds[key.kind], key, survey, self.clock)
            except Exception:
                log.exception("%s: this is a fault of the operator", key)
                rest = None
            if rest is None:
                self.queue.add(key)
                continue
            metrics.RECONCILE_SECONDS.labels(key.kind, "rests").observe(time.monotonic() - started)
            if rest.requeue_after is not None:
                self.queue.add(key, rest.requeue_after)
            await asyncio.sleep(0)  # the watches, the workers and the probes go on meanwhile

    async def _serve(self, health_port: int, metrics_port: int) -> list[web.AppRunner]:
        async def health(_: web.Request) -> web.Response:
            stalled = self.queue.stalled
            if stalled > STUCK_SECONDS:
                return web.Response(status=503, text=f"keys are due, and none was looked at for {stalled:.0f} s\n")
            return web.Response(text="ok\n")

        async def figures(_: web.Request) -> web.Response:
            metrics.QUEUE_DEPTH.set(self.queue.depth)
            metrics.QUEUE_OLDEST.set(self.queue.oldest)
            return web.Response(body=generate_latest(metrics.REGISTRY), content_type="text/plain")

        return [
            await _listen(health_port, "/healthz", health),
            await _listen(metrics_port, "/metrics", figures),
        ]


async def _listen(port: int, path: str, handler: Any) -> web.AppRunner:
    application = web.Application()
    application.router.add_get(path, handler)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104 - a pod's ports are for its node and Prometheus
    return runner


async def serve(chosen: Settings, health_port: int, metrics_port: int, clock: Clock = utc) -> None:
    """Connect and run."""
    kube = await Kube.connect()
    try:
        await Operator(chosen, kube, clock).run(health_port, metrics_port)
    finally:
        await kube.close()


def main(clock: Clock = utc) -> int:
    """The container's command."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--settings", type=Path, required=True, help="settings.json of the installation")
    arguments.add_argument("--health-port", type=int, default=HEALTH_PORT)
    arguments.add_argument("--metrics-port", type=int, default=METRICS_PORT)
    given = arguments.parse_args()
    chosen = settings.load(given.settings)
    logging.basicConfig(
        level=chosen.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    asyncio.run(serve(chosen, given.health_port, given.metrics_port, clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
