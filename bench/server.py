"""What the agent costs: latency and throughput through it, beside the engine direct: `python -m bench.server [--json]`.

The engine is a stub that answers at once, so that nothing but the agent's own work is in the difference; with a real
engine the same milliseconds stand beside its tens to hundreds. Stub, agent and client are processes of their own and
share the machine's cores, so that throughput is a lower bound of what an agent with a core to itself does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

STREAM_CHUNKS = 200
CHUNK = {"id": "cmpl-0", "object": "text_completion", "created": 0, "choices": [{"index": 0, "text": " word"}]}


class Way(NamedTuple):
    """One way to the engine: where to ask, for which model, and the process that is asked."""

    url: str
    model: str
    pid: int


class Figures(NamedTuple):
    """One way to the engine."""

    latency_p50_ms: float
    latency_p99_ms: float
    first_byte_p50_ms: float
    requests_per_second: float
    chunks_per_second: float
    cpu_ms_per_request: float
    """Of the process asked: the stub's, or the agent's. Unlike times, it does not depend on what else runs."""
    cpu_us_per_chunk: float


def main() -> int:
    """Measure both ways in turns and print them side by side."""
    options = _options()
    if options.stub:
        web.run_app(_stub(), host="127.0.0.1", port=options.stub, print=None, access_log=None)
        return 0
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as place,
        _programs(Path(place)) as (direct, through),
    ):
        rounds = [asyncio.run(_both(direct, through, options)) for _ in range(options.rounds)]
        memory = _resident(through.pid)
    engine, agent = (_median([each[way] for each in rounds]) for way in (0, 1))
    if options.json:
        print(json.dumps({"engine": engine._asdict(), "agent": agent._asdict(), "agent_resident_mib": memory}))
    else:
        _table(engine, agent, memory)
    return 0


def _options() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add_argument("--requests", type=int, default=500, help="requests of each kind")
    flags.add_argument("--clients", type=int, default=32, help="clients at once when throughput is measured")
    flags.add_argument("--rounds", type=int, default=3, help="rounds; the figures are medians")
    flags.add_argument("--stub", type=int, default=0, help=argparse.SUPPRESS)
    return flags.parse_args()


# ------------------------------------------------------------------------------------------------ programs


def _stub() -> web.Application:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "base@local", "max_model_len": 4096}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chunk = json.dumps({**CHUNK, "model": body["model"]}, separators=(",", ":"))
        if not body.get("stream"):
            return web.Response(text=chunk, content_type="application/json")
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for _ in range(STREAM_CHUNKS):
            await answer.write(f"data: {chunk}\n\n".encode())
            # One write, one packet, as tokens come one by one.
            await asyncio.sleep(body.get("pace", 0))
        await answer.write(b"data: [DONE]\n\n")
        return answer

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    return app


@contextmanager
def _programs(place: Path) -> Iterator[tuple[Way, Way]]:
    """A stub, and an agent before it."""
    ports = [_free_port() for _ in range(4)]
    model = place / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    source = {"field": "model.from", "reference": "volume://bench", "path": str(model)}
    (place / "desired.json").write_text(json.dumps({"model": {"name": "base", "source": source}}))
    agent = [
        *(sys.executable, "-m", "trimtab_server.agent", f"--desired-file={place / 'desired.json'}"),
        *(f"--report-file={place / 'report.json'}", f"--work={place}", "--host=127.0.0.1", f"--port={ports[1]}"),
        *(f"--metrics-port={ports[2]}", f"--drain-port={ports[3]}", f"--engine-url=http://127.0.0.1:{ports[0]}"),
    ]
    stub = [sys.executable, "-m", "bench.server", f"--stub={ports[0]}"]
    with (place / "log").open("wb") as log:
        started = [subprocess.Popen(line, stdout=log, stderr=log) for line in (stub, agent)]
    try:
        asyncio.run(_ready(f"http://127.0.0.1:{ports[1]}", place / "log"))
        yield (
            Way(f"http://127.0.0.1:{ports[0]}", "base@local", started[0].pid),
            Way(f"http://127.0.0.1:{ports[1]}", "base", started[1].pid),
        )
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(40)


async def _ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/healthz/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError as error:
                last: object = error
            else:
                last = answer.status
            if time.monotonic() > deadline:
                told = await asyncio.to_thread(log.read_text)
                raise SystemExit(f"the agent is not ready after 30 s ({last}):\n{told}")
            await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


# ------------------------------------------------------------------------------------------------ measures


async def _both(direct: Way, through: Way, options: argparse.Namespace) -> tuple[Figures, Figures]:
    return await _measure(direct, options), await _measure(through, options)


async def _measure(way: Way, options: argparse.Namespace) -> Figures:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        body = {"model": way.model, "prompt": "word " * 200, "max_tokens": 16}
        stream = {**body, "stream": True}
        for _ in range(50):
            await _ask(session, way.url, body)
        alone = sorted([await _ask(session, way.url, body) for _ in range(options.requests)])
        firsts = [await _first_byte(session, way.url, {**stream, "pace": 0.001}) for _ in range(50)]
        each = max(1, options.requests // options.clients)
        requests, streams = each * options.clients, options.clients * 2
        took, burnt = await _timed(way.pid, [_many(session, way.url, body, each) for _ in range(options.clients)])
        flowed, streamed = await _timed(way.pid, [_many(session, way.url, stream, 1) for _ in range(streams)])
    return Figures(
        latency_p50_ms=statistics.median(alone),
        latency_p99_ms=alone[int(len(alone) * 0.99)],
        first_byte_p50_ms=statistics.median(firsts),
        requests_per_second=requests / took,
        chunks_per_second=streams * STREAM_CHUNKS / flowed,
        cpu_ms_per_request=burnt / requests * 1e3,
        cpu_us_per_chunk=streamed / (streams * STREAM_CHUNKS) * 1e6,
    )


async def _timed(pid: int, work: list[Coroutine[Any, Any, None]]) -> tuple[float, float]:
    """Seconds that the work took, and seconds of processor time that the process spent meanwhile."""
    began, burnt = time.perf_counter(), _processor_seconds(pid)
    await asyncio.gather(*work)
    return time.perf_counter() - began, _processor_seconds(pid) - burnt


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> float:
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.read()
    return (time.perf_counter() - began) * 1000


async def _many(session: aiohttp.ClientSession, url: str, body: dict[str, object], times: int) -> None:
    for _ in range(times):
        await _ask(session, url, body)


async def _first_byte(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> float:
    began = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        await answer.content.readany()
        elapsed = (time.perf_counter() - began) * 1000
        await answer.read()
    return elapsed


def _median(rounds: list[Figures]) -> Figures:
    return Figures(*(statistics.median(values) for values in zip(*rounds, strict=True)))


def _table(engine: Figures, agent: Figures, memory: float) -> None:
    print(f"{'':28}{'engine direct':>15}{'through agent':>15}{'difference':>15}")
    for name in Figures._fields:
        ours, bare = getattr(agent, name), getattr(engine, name)
        told = f"{ours / bare:.0%}" if name.endswith("second") else f"{ours - bare:+.2f}"
        print(f"{name.replace('_', ' '):28}{bare:>15.2f}{ours:>15.2f}{told:>15}")
    print(f"agent's resident memory: {memory:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
