"""The agent's way through the Kubernetes API: lists, watches that break in every way, patches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.ports import free_port
from trimtab_api.contract import SERVE_KEY
from trimtab_server.agent import cluster as cluster_room
from trimtab_server.agent.cluster import Cluster, ClusterError
from trimtab_server.agent.desired import Desired, follow_config_map
from trimtab_server.agent.report import SIZE_LIMIT, ConfigMapSink, Reporter, bounded

from .conftest import eventually

PATH = "/api/v1/namespaces/team/configmaps"


class FakeServer:
    """As much of an API server as the agent talks to."""

    def __init__(self) -> None:
        self.port = free_port()
        self.version = 1
        self.value: str | None = "one"
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue()
        """Lines for the running watch; None cuts the connection."""
        self.lists = 0
        self.watches: list[dict[str, str]] = []
        self.fail_next: list[int] = []
        self.patches: list[Any] = []
        self.tokens: list[str] = []
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(middlewares=[self._admit])
        app.router.add_get(PATH, self._get)
        app.router.add_patch(f"{PATH}/{{name}}", self._patch)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def config_map(self) -> dict[str, Any]:
        return {"metadata": {"name": "x-desired"}, "data": {SERVE_KEY: self.value}}

    def say(self, kind: str, value: str | None) -> None:
        """Change the object and tell the watch."""
        self.value, self.version = value, self.version + 1
        self.events.put_nowait(json.dumps({"type": kind, "object": self.config_map()}).encode() + b"\n")

    @web.middleware
    async def _admit(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.tokens.append(request.headers["Authorization"])
        if self.fail_next:
            return web.Response(status=self.fail_next.pop(0), text="refused")
        result: web.StreamResponse = await handler(request)
        return result

    async def _get(self, request: web.Request) -> web.StreamResponse:
        assert request.query["fieldSelector"] == "metadata.name=x-desired"
        if "watch" in request.query:
            return await self._watch(request)
        self.lists += 1
        items = [self.config_map()] if self.value is not None else []
        return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.watches.append(dict(request.query))
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            line = await self.events.get()
            if line is None:
                assert request.transport is not None
                request.transport.close()
                return answer
            if line == b"end":
                return answer
            await answer.write(line)

    async def _patch(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/merge-patch+json"
        self.patches.append((request.match_info["name"], json.loads(await request.read())))
        return web.json_response({})


@asynccontextmanager
async def _following(server: FakeServer, cluster: Cluster) -> AsyncIterator[list[str | None]]:
    seen: list[str | None] = []

    async def follow() -> None:
        async for found in cluster.follow_config_map("x-desired"):
            seen.append(found["data"][SERVE_KEY] if found else None)

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    running = FakeServer()
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def cluster(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(cluster_room, "LONGEST_PAUSE", 0.1)
    (tmp_path / "token").write_text("first\n")
    opened = Cluster(f"http://127.0.0.1:{server.port}", "team", tmp_path / "token", None)
    yield opened
    await opened.close()


async def test_changes_arrive_in_order_and_bookmarks_do_not(server: FakeServer, cluster: Cluster) -> None:
    async with _following(server, cluster) as seen:
        await eventually("it watches", lambda: server.watches)
        assert server.watches[0]["resourceVersion"] == "1"
        assert server.watches[0]["allowWatchBookmarks"] == "true"
        server.events.put_nowait(b'{"type":"BOOKMARK","object":{}}\n')
        server.say("MODIFIED", "two")
        server.say("DELETED", None)
        server.say("ADDED", "three")
        await eventually("all arrive", lambda: seen == ["one", "two", None, "three"])


def _cut(server: FakeServer) -> None:
    server.events.put_nowait(None)


def _end(server: FakeServer) -> None:
    server.events.put_nowait(b"end")


def _gone(server: FakeServer) -> None:
    server.events.put_nowait(b'{"type":"ERROR","object":{"code":410,"message":"too old"}}\n')


def _garbage(server: FakeServer) -> None:
    server.events.put_nowait(b"<html>\n")


def _refusals(server: FakeServer) -> None:
    server.fail_next = [410, 500, 403, 401]
    server.events.put_nowait(None)


@pytest.mark.parametrize("breaking", [_cut, _end, _gone, _garbage, _refusals], ids=lambda each: each.__name__[1:])
async def test_what_happened_while_a_watch_was_broken_is_found(
    server: FakeServer, cluster: Cluster, breaking: Callable[[FakeServer], None]
) -> None:
    async with _following(server, cluster) as seen:
        await eventually("it watches", lambda: server.watches)
        server.value, server.version = "two", 7
        breaking(server)
        await eventually("it is found", lambda: seen == ["one", "two"])
        await eventually("it watches again", lambda: len(server.watches) >= 2)
        assert server.watches[-1]["resourceVersion"] == "7"
        server.say("MODIFIED", "three")
        await eventually("it follows", lambda: seen[-1] == "three")


async def test_a_server_that_is_down_is_waited_for(server: FakeServer, cluster: Cluster) -> None:
    await server.stop()
    async with _following(server, cluster) as seen:
        await asyncio.sleep(0.3)
        await server.start()
        await eventually("it is found", lambda: seen == ["one"])


async def test_a_renewed_token_is_used(server: FakeServer, cluster: Cluster, tmp_path: Path) -> None:
    await cluster.patch_config_map("x-reports", {"pod": "text"})
    (tmp_path / "token").write_text("second")
    await cluster.patch_config_map("x-reports", {"pod": None})
    assert server.tokens == ["Bearer first", "Bearer second"]
    assert server.patches == [("x-reports", {"data": {"pod": "text"}}), ("x-reports", {"data": {"pod": None}})]


async def test_refusals_name_what_was_tried(server: FakeServer, cluster: Cluster) -> None:
    server.fail_next = [403]
    with pytest.raises(ClusterError, match="patching ConfigMap x-reports: HTTP 403") as caught:
        await cluster.patch_config_map("x-reports", {})
    assert caught.value.status == 403
    await server.stop()
    with pytest.raises(ClusterError, match="patching ConfigMap x-reports: Client"):
        await cluster.patch_config_map("x-reports", {})


async def test_desired_tells_what_is_missing_and_keeps_what_it_had(server: FakeServer, cluster: Cluster) -> None:
    server.value = None
    desired = Desired(lambda: None)
    task = asyncio.create_task(follow_config_map(desired, cluster, "x-desired"))
    await eventually("it complains", lambda: "ConfigMap team/x-desired does not exist" in desired.complaint)
    sound = {"model": {"name": "base", "source": {"field": "model.from", "reference": "r", "path": "/m"}}}
    await eventually("it watches", lambda: server.watches)
    server.say("ADDED", json.dumps(sound))
    await eventually("it is taken", lambda: desired.now is not None and not desired.complaint)
    kept = desired.now
    server.say("MODIFIED", json.dumps({"model": 1}))
    await eventually("it complains", lambda: "does not parse" in desired.complaint)
    assert desired.now is kept
    task.cancel()


async def test_reports_are_brought_when_they_can_be_and_only_when_they_change(
    server: FakeServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, make_report: Callable[..., Any]
) -> None:
    monkeypatch.setattr("trimtab_server.agent.report.SHORTEST_PAUSE", 0.02)
    told = [make_report("Starting")]
    reporter = Reporter(ConfigMapSink(cluster, "x-reports", "pod-0"), lambda: told[-1])
    server.fail_next = [500, 404]
    task = asyncio.create_task(reporter.run())
    await eventually("it is brought", lambda: len(server.patches) == 1)
    reporter.changed()
    told.append(make_report("Serving"))
    reporter.changed()
    await eventually("the new one is brought", lambda: len(server.patches) == 2)
    reporter.changed()
    await asyncio.sleep(0.2)
    assert len(server.patches) == 2
    assert json.loads(server.patches[1][1]["data"]["pod-0"])["reason"] == "Serving"
    task.cancel()
    await reporter.withdraw()
    assert server.patches[-1] == ("x-reports", {"data": {"pod-0": None}})


@pytest.mark.parametrize(("adapters", "length"), [(0, 10), (64, 10), (64, 1024)])
def test_a_report_stays_small(make_report: Callable[..., Any], adapters: int, length: int) -> None:
    text = bounded(make_report("Serving", adapters=adapters, message="é" * length))
    assert len(text.encode()) <= SIZE_LIMIT
    assert len(json.loads(text)["adapters"]) == adapters
