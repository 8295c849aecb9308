"""Real S3 servers for the store's tests, and a proxy that spoils what passes through it."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ports import free_port
from trimtab_api.contract import Connection
from trimtab_store import S3, connect

KEY, SECRET = "TESTKEY", "testsecret"
TOOLS = Path(sys.executable).parent


def eventually(what: str, holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds, or fail by its name."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def keys_folder(folder: Path, key: str = KEY, secret: str = SECRET) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "AWS_ACCESS_KEY_ID").write_text(f"{key}\n")
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(f"{secret}\n")
    return str(folder)


@dataclass
class Server:
    """`rclone serve s3` over a folder; can be stopped and started again on its port."""

    root: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [TOOLS / "rclone", "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}"]
        with (self.root.parent / "rclone.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options, self.root],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "RCLONE_CONFIG": os.devnull, "HOME": str(self.root.parent)},
            )
        eventually("rclone listens", lambda: listening(self.port))

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; each test has a bucket of its own."""
    running = Server(tmp_path_factory.mktemp("rclone") / "served")
    running.root.mkdir()
    running.start()
    yield running
    running.stop()


@pytest.fixture
def connection(server: Server, tmp_path: Path) -> Connection:
    return Connection(endpoint=server.endpoint, path_style=True, credentials_dir=keys_folder(tmp_path / "keys"))


@pytest.fixture(scope="session")
def s3(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    keys = keys_folder(tmp_path_factory.mktemp("keys"))
    with connect(Connection(endpoint=server.endpoint, path_style=True, credentials_dir=keys), patience=5) as opened:
        yield opened


@pytest.fixture
def bucket(s3: S3, server: Server, tmp_path: Path) -> Iterator[str]:
    """s3:// uri of an empty bucket."""
    name = "".join(letter for letter in tmp_path.name.lower() if letter.isalnum())[:40] + f"-{os.getpid()}"
    s3.client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    shutil.rmtree(server.root / name, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Makes a folder of files."""

    def make(files: dict[str, bytes], name: str = "source") -> Path:
        root = tmp_path / name
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        return root

    return make


def read_folder(root: Path) -> dict[str, bytes]:
    """The files below a folder but for the manifest."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if path != "manifest.json"}


# ------------------------------------------------------------------------------------------------ faults


@dataclass
class Fault:
    """What shall happen to the next `times` requests that match."""

    kind: str
    """status, reset, short, stall, flip, slow."""
    method: str = "GET"
    contains: str = ""
    times: int = 1
    value: int = 0
    """Status code; bytes after which it breaks; number of the byte that is flipped; seconds."""
    code: str = ""
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        return self.seen < self.times and method == self.method and self.contains in path


class Proxy:
    """An HTTP proxy in front of a server that applies faults; `down` refuses every connection meanwhile."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.port = free_port()
        self.httpd: ThreadingHTTPServer | None = None
        self.up()

    def up(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        ThreadingHTTPServer.allow_reuse_address = True
        self.httpd = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.httpd.daemon_threads = True
        self.httpd.block_on_close = False
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        if self.httpd is not None:
            self.httpd.shutdown()
            self.httpd.server_close()
            self.httpd = None

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.takes(method, path):
                    fault.seen += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.next_fault(self.command, self.path)
        if fault is not None and fault.kind == "reset":
            return self.reset()
        if fault is not None and fault.kind == "status":
            return self.answer(fault.value, fault.code)
        if fault is not None and fault.kind == "stall" and not fault.value:
            self.owner.released.wait(30)
            return self.reset()
        if fault is not None and fault.kind == "slow":
            self.owner.released.wait(fault.value)
        return self.forward(body, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def forward(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            content = b"" if self.command == "HEAD" else answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            self.send_content(content, fault)
        except ConnectionRefusedError:
            self.reset()
        finally:
            upstream.close()

    def send_content(self, content: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "flip":
            at = min(fault.value, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        if fault is not None and fault.kind in ("short", "stall"):
            self.wfile.write(content[: fault.value])
            self.wfile.flush()
            if fault.kind == "stall":
                self.owner.released.wait(30)
            self.close_connection = True
            return
        self.wfile.write(content)

    def answer(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>spoilt</Message></Error>".encode() if code else b""
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reset(self) -> None:
        # Lingering for no time sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    between = Proxy(server.port)
    yield between
    between.released.set()
    between.down()


@pytest.fixture
def through(proxy: Proxy, connection: Connection) -> Iterator[S3]:
    """The same storage, reached through the proxy."""
    with connect(connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"}), patience=8) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
