"""What probes and tools reach beside the clients' door: metrics for Prometheus, and the drain for the pod itself."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from prometheus_client import generate_latest

from trimtab_server.agent import metrics
from trimtab_server.agent.state import State
from trimtab_server.drain import DRAIN_SECONDS

log = logging.getLogger("trimtab.agent.operations")

LINGER_SECONDS = 3.0
"""How long new requests still come after the pod became unready: until every node has heard of it."""


def metrics_application(state: State) -> web.Application:
    """GET /metrics: the agent's figures, then the engine's."""

    async def show(_: web.Request) -> web.Response:
        own = expose(state)
        return web.Response(body=own + await state.engine.metrics(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/metrics", show)
    return app


def drain_application(state: State) -> web.Application:
    """POST /drain: returns when the running answers have ended. Bound to the loopback alone."""

    async def drain_now(_: web.Request) -> web.Response:
        ended = await drain(state, LINGER_SECONDS, DRAIN_SECONDS)
        return web.Response(text="drained\n" if ended else f"{state.table.running} answers still run\n")

    app = web.Application()
    app.router.add_post("/drain", drain_now)
    return app


async def drain(state: State, linger_seconds: float, limit_seconds: float) -> bool:
    """Send no more clients here and wait for the running answers; whether all ended within the limit."""
    log.info("draining: %d answers run", state.table.running)
    state.draining = True
    state.drained_generation = state.engine.generation
    if not state.engine.answers:
        return True
    await asyncio.sleep(linger_seconds)
    return await state.table.idle(None, limit_seconds - linger_seconds)


def expose(state: State) -> bytes:
    """The figures of this moment in the text format."""
    metrics.RUNNING.set(state.table.running)
    metrics.READY.set(state.ready)
    metrics.ENGINE_STARTS.set(state.engine.generation)
    metrics.ADAPTERS.clear()
    for each in state.adapters.reports():
        metrics.ADAPTERS.labels(each.reason.value).inc()
    return generate_latest(metrics.REGISTRY)
