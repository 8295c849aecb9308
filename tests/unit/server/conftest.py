"""Makers for the server's tests: artifacts in a real S3 server, an engine that imitates vLLM, a running agent."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import save_file

from tests.ports import free_port
from trimtab_api.contract import (
    AgentReport,
    Connection,
    ModelInput,
    S3Place,
    ServeAdapter,
    ServeConfig,
    ServeModel,
)
from trimtab_server.agent import adapters, backoff, engine, inputs, operations, report
from trimtab_server.agent.program import Agent, Settings
from trimtab_store import connect, publish, upload_files

KEY, SECRET = "TESTKEY", "testsecret"
HIDDEN = 8
MODULES = ("self_attn.q_proj", "self_attn.v_proj")


async def eventually(what: str, holds: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until something holds (it may be awaitable), or fail by its name; returns what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------------------ artifacts


def write_base(folder: Path, hidden: int = HIDDEN, layers: int = 2, **config: Any) -> Path:
    """A folder that looks like a Llama to whoever reads names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tensors: dict[str, Any] = {"model.embed_tokens.weight": np.zeros((16, hidden), np.float32)}
    for layer in range(layers):
        for module in MODULES:
            tensors[f"model.layers.{layer}.{module}.weight"] = np.zeros((hidden, hidden), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(
    folder: Path, rank: int = 4, hidden: int = HIDDEN, seed: int = 0, layers: int = 2, **config: Any
) -> Path:
    """A folder that looks like a PEFT adapter on that Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = np.full((rank, hidden), seed, np.float32)
            tensors[f"{name}.lora_B.weight"] = np.full((hidden, rank), seed, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@dataclass
class Storage:
    """`rclone serve s3` over a folder, and what the tests publish into it."""

    root: Path
    keys: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        rclone = Path(sys.executable).parent / "rclone"
        line: list[str | Path] = [
            rclone,
            "serve",
            "s3",
            "--auth-key",
            f"{KEY},{SECRET}",
            "--addr",
            f"127.0.0.1:{self.port}",
            self.root,
        ]
        with (self.root.parent / "rclone.log").open("ab") as log:
            env = {"PATH": os.environ["PATH"], "RCLONE_CONFIG": os.devnull, "HOME": str(self.root.parent)}
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env=env)
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, "rclone does not listen"
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def connection(self) -> Connection:
        for name, value in (("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)):
            self.keys.mkdir(exist_ok=True)
            (self.keys / name).write_text(value)
        return Connection(endpoint=f"http://127.0.0.1:{self.port}", path_style=True, credentials_dir=str(self.keys))

    def remove(self, place: S3Place) -> None:
        with connect(self.connection(), patience=10) as s3:
            s3.delete_prefix(place.uri)

    def put_bare(self, folder: Path, uri: str) -> S3Place:
        """Upload a folder as a user would: without a manifest."""
        with connect(self.connection(), patience=10) as s3:
            upload_files(s3, folder, uri)
        return S3Place(uri=uri, connection=self.connection())

    def put(self, folder: Path, uri: str, base: S3Place | None = None) -> S3Place:
        """Publish a folder as an artifact."""
        made_by = {"base": {"uri": base.uri, "digest": base.digest}} if base else {}
        with connect(self.connection(), patience=10) as s3:
            manifest = publish(s3, folder, uri, made_by)
        return S3Place(uri=uri, connection=self.connection(), digest=manifest.digest)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    folder = tmp_path_factory.mktemp("storage")
    (folder / "served" / "models").mkdir(parents=True)
    storage = Storage(folder / "served", folder / "keys")
    storage.start()
    yield storage
    storage.stop()


@pytest.fixture
def storage(rclone: Storage) -> Iterator[Storage]:
    """The shared server, running again whatever the test before did to it."""
    if rclone.process is None:
        rclone.start()
    yield rclone
    if rclone.process is None:
        rclone.start()


# ------------------------------------------------------------------------------------------------ engine


class FakeEngine:
    """Imitates what the agent uses of vLLM 0.32: routes, codes, compact JSON, and forgetting all at a restart."""

    def __init__(self, port: int, handoff: Path) -> None:
        self.port = port
        self.handoff = handoff
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.refuse: set[str] = set()
        """Adapters (the name before the @) whose load fails."""
        self.load_gate = asyncio.Event()
        self.stream_gate = asyncio.Event()
        """Streams write their first token, then wait here."""
        self.silent = False
        """Take connections and answer none."""
        self.sick = False
        """Answer every generation with 500."""
        self.cancelled = 0
        self.last_body = b""
        self.load_gate.set()
        self.stream_gate.set()
        self._runner: web.AppRunner | None = None

    @property
    def base(self) -> str:
        told = json.loads(self.handoff.read_text())
        return f"{told['name']}@{told['digest'].removeprefix('sha256:')[:12]}"

    async def start(self) -> None:
        """Begin to listen, once the agent has handed the model over."""
        await eventually("the agent hands the model over", self.handoff.exists)
        app = web.Application(middlewares=[self._moods])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def kill(self) -> None:
        """End as a killed process ends: connections cut, adapters forgotten."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections):  # type: ignore[union-attr]
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None
        self.adapters.clear()

    def loads(self, name: str) -> int:
        return sum(1 for what, which in self.calls if what == "load" and which.startswith(f"{name}@"))

    @web.middleware
    async def _moods(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.silent:
            await asyncio.sleep(3600)
        result: web.StreamResponse = await handler(request)
        return result

    async def _models(self, _: web.Request) -> web.Response:
        names = [self.base, *self.adapters]
        return _compact({"object": "list", "data": [{"id": each, "max_model_len": 64} for each in names]})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n")

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        self.calls.append(("load", name))
        await self.load_gate.wait()
        if name in self.adapters:
            return _compact({"error": {"message": "has already been loaded", "code": 400}}, 400)
        if name.split("@")[0] in self.refuse or not os.path.isfile(f"{body['lora_path']}/adapter_config.json"):  # noqa: ASYNC240, PTH113
            return _compact({"error": {"message": "words that change", "code": 500}}, 500)
        self.adapters[name] = body["lora_path"]
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(("unload", name))
        known = self.adapters.pop(name, None)
        return web.Response(text="Success") if known else _compact({"error": {"code": 404}}, 404)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.last_body = await request.read()
        body = json.loads(self.last_body)
        model = body["model"]
        self.calls.append(("generate", model))
        if self.sick:
            return _compact({"error": {"message": "EngineCore encountered an issue", "code": 500}}, 500)
        if model != self.base and model not in self.adapters:
            return _compact({"error": {"message": "does not exist", "code": 404}}, 404)
        try:
            if body.get("stream"):
                return await self._stream(request, model)
            if body.get("slow"):
                await self.stream_gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        text = f"I am {model}"
        return _compact({"id": "c-1", "model": model, "choices": [{"text": text}]})

    async def _stream(self, request: web.Request, model: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        for number in range(3):
            event = {"id": "c-1", "model": model, "choices": [{"text": f'{number} "model":"{model}"'}]}
            await answer.write(f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode())
            await self.stream_gate.wait()
        await answer.write(b"data: [DONE]\n\n")
        return answer


def _compact(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, text=json.dumps(body, separators=(",", ":")), content_type="application/json")


# ------------------------------------------------------------------------------------------------ agent


class Bench:
    """An agent over a file, its fake engine, and a client."""

    def __init__(self, folder: Path, storage: Storage, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.storage = storage
        self.session = session
        self.settings = Settings(
            pod_name="pod-0",
            pod_uid="uid-0",
            desired_file=folder / "desired.json",
            report_file=folder / "report.json",
            work=folder / "work",
            handoff=folder / "work" / "engine" / "handoff.json",
            host="127.0.0.1",
            port=free_port(),
            metrics_port=free_port(),
            drain_port=free_port(),
            engine_url=f"http://127.0.0.1:{free_port()}",
        )
        self.engine = FakeEngine(int(self.settings.engine_url.rsplit(":", 1)[1]), self.settings.handoff)
        self.base = storage.put(write_base(folder / "base"), f"s3://models/{folder.name}/base")
        self.agent: Agent | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def adapter(self, name: str, *, base: S3Place | None = None, **made: Any) -> S3Place:
        """Publish an adapter of the bench's base (or said to be of another)."""
        folder = write_adapter(self.folder / name, **made)
        return self.storage.put(folder, f"s3://models/{self.folder.name}/{name}", base or self.base)

    def want(self, room: int = 16, **places: S3Place | ModelInput) -> None:
        """Write the desired state: the base, and these adapters in this order."""
        listed = [
            ServeAdapter(
                name=name,
                source=place
                if isinstance(place, ModelInput)
                else ModelInput(field=f"adapters[{name}].from", reference=place.uri, s3=place),
            )
            for name, place in places.items()
        ]
        model = ServeModel(name="base", source=ModelInput(field="model.from", reference=self.base.uri, s3=self.base))
        config = ServeConfig(model=model, adapters=listed, max_lora_rank=room)
        assert self.settings.desired_file is not None
        draft = self.settings.desired_file.with_suffix(".draft")
        draft.write_text(json.dumps(config.dump()))
        draft.replace(self.settings.desired_file)

    async def start_agent(self) -> None:
        self.agent = Agent(self.settings)
        self._running = asyncio.create_task(self.agent.run())
        await eventually("the agent listens", lambda: self.status("/healthz/live"))

    async def stop_agent(self) -> None:
        """End the agent in order, or raise what it failed with."""
        if self.agent is not None and self._running is not None:
            self.agent.stop.set()
            async with asyncio.timeout(20):
                await self._running
            self.agent = self._running = None

    async def kill_agent(self) -> None:
        """End the agent without letting it tidy up."""
        assert self._running is not None
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self.agent = self._running = None

    async def begin(self) -> None:
        """Start agent and engine and wait until clients may come."""
        await self.start_agent()
        await self.engine.start()
        await self.until_ready()

    async def until_ready(self, seconds: float = 15) -> None:
        await eventually("the pod is ready", self.ready, seconds)

    async def ready(self) -> bool:
        return await self.status("/healthz/ready") == 200

    async def status(self, path: str) -> int:
        try:
            async with self.session.get(f"{self.url}{path}") as answer:
                return answer.status
        except aiohttp.ClientError:
            return 0

    async def models(self) -> list[str]:
        async with self.session.get(f"{self.url}/v1/models") as answer:
            return [each["id"] for each in (await answer.json()).get("data", [])]

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, Any], Any]:
        """Status, JSON and headers."""
        async with self.session.post(f"{self.url}{path}", json=body) as answer:
            return answer.status, await answer.json(), answer.headers

    async def ask(self, model: str) -> str:
        """What answers under the name: the engine's own name of it, or the status when refused."""
        status, body, _ = await self.post(model=model, prompt="who are you?")
        return body["choices"][0]["text"].removeprefix("I am ") if status == 200 else str(status)

    async def answers(self, place: S3Place, name: str) -> bool:
        """Whether this very version answers under the name."""
        return await self.ask(name) == exact(name, place)

    def report(self) -> AgentReport | None:
        try:
            return AgentReport.model_validate_json((self.folder / "report.json").read_text())
        except FileNotFoundError:
            return None

    def reason(self, adapter: str) -> str:
        told = self.report()
        return next((each.reason.value for each in told.adapters if each.name == adapter), "") if told else ""

    def message(self, adapter: str) -> str:
        told = self.report()
        assert told is not None
        return next(each.message for each in told.adapters if each.name == adapter)


def exact(name: str, place: S3Place) -> str:
    assert place.digest is not None
    return f"{name}@{place.digest.removeprefix('sha256:')[:12]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's pauses, shortened so that nothing has to be waited for that is not looked at."""
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(backoff, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(inputs, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(report, "SHORTEST_PAUSE", 0.05)
    monkeypatch.setattr(operations, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(adapters, "UNLOAD_TRIES", 2)


@asynccontextmanager
async def open_bench(folder: Path, storage: Storage) -> AsyncIterator[Bench]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        bench = Bench(folder, storage, session)
        try:
            yield bench
        finally:
            bench.engine.load_gate.set()
            bench.engine.stream_gate.set()
            await bench.stop_agent()
            await bench.engine.kill()


@pytest.fixture
async def bench(tmp_path: Path, storage: Storage, impatient: None) -> AsyncIterator[Bench]:
    async with open_bench(tmp_path, storage) as opened:
        yield opened


Probe = Callable[[], Awaitable[bool]]


@pytest.fixture
def make_report() -> Callable[..., AgentReport]:
    def make(reason: str, adapters: int = 0, message: str = "") -> AgentReport:
        listed = [
            {"name": f"adapter-{number}", "digest": "sha256:" + "a" * 64, "reason": "BaseMismatch", "message": message}
            for number in range(adapters)
        ]
        return AgentReport.model_validate(
            {"podUid": "uid", "modelReady": True, "reason": reason, "message": message, "adapters": listed}
        )

    return make
