"""HTTP/1.1 as far as a plain request needs it: a head and a body there, a head and a body of known length back.

Reading an answer's head takes a sixth of what the standard library's general reader takes, which goes by way of mail
headers. What is not of this simplest form has no length here, and the caller asks in another way.
"""

from __future__ import annotations

import socket
import ssl
import threading
import weakref
from collections.abc import Mapping
from io import BufferedReader
from typing import NamedTuple

from botocore.exceptions import ConnectionClosedError, ConnectTimeoutError, EndpointConnectionError, SSLError
from urllib3.util.wait import wait_for_read

_HEAD = 1 << 16
"""Longest head of an answer, in bytes."""
_BUFFER = 1 << 15


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    """http or https."""
    host: str
    port: int

    @property
    def url(self) -> str:
        """The origin as a URL."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class Limits(NamedTuple):
    """Seconds without a sign of life after which a request is given up, and connections of one origin that are kept."""

    connect: float
    read: float
    kept: int


class Wires:
    """Connections that stay open between requests. Threads may share it.

    `trust`: the file of the authorities that a server's certificate may be of; None trusts every server.
    """

    def __init__(self, limits: Limits, trust: str | None) -> None:
        self._limits = limits
        self._trust = trust
        self._idle: dict[Origin, list[_Wire]] = {}
        # As urllib3's pools do: who drops the connection without closing it leaves no open socket.
        weakref.finalize(self, _hang_up, self._idle)
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def ask(
        self, origin: Origin, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Asked:
        """Send a request. Raises botocore's errors of connections, and OSError."""
        wire = self._take(origin)
        try:
            wire.send(method, path, headers, body)
        except BaseException:
            wire.close()
            raise
        return Asked(self, origin, wire)

    def close(self) -> None:
        """Close what is kept."""
        with self._lock:
            _hang_up(self._idle)

    def _keep(self, origin: Origin, wire: _Wire) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if len(idle) < self._limits.kept:
                idle.append(wire)
                return
        wire.close()

    def _take(self, origin: Origin) -> _Wire:
        """A connection that the server has not closed meanwhile, or a new one."""
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                wire = idle.pop() if idle else None
            if wire is None:
                return _Wire(self._connect(origin), origin)
            if not wire.left:
                return wire
            wire.close()

    def _connect(self, origin: Origin) -> socket.socket:
        try:
            opened = socket.create_connection((origin.host, origin.port), self._limits.connect)
            if origin.scheme == "https":
                opened = self._context().wrap_socket(opened, server_hostname=origin.host)
        except ssl.SSLError as error:
            raise SSLError(endpoint_url=origin.url, error=error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(endpoint_url=origin.url, error=error) from error
        except OSError as error:
            raise EndpointConnectionError(endpoint_url=origin.url, error=error) from error
        opened.settimeout(self._limits.read)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return opened

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context(cafile=self._trust)
                if self._trust is None:
                    self._tls.check_hostname = False
                    self._tls.verify_mode = ssl.CERT_NONE
            return self._tls


def _hang_up(idle: dict[Origin, list[_Wire]]) -> None:
    for wires in idle.values():
        for wire in wires:
            wire.close()
    idle.clear()


class _Wire:
    """One connection."""

    def __init__(self, opened: socket.socket, origin: Origin) -> None:
        self._socket = opened
        self._origin = origin
        self._torn = False
        reader = opened.makefile("rb", _BUFFER)
        assert isinstance(reader, BufferedReader)
        self.reader = reader

    @property
    def left(self) -> bool:
        """The server has hung up, or talks unasked."""
        return bool(wait_for_read(self._socket, timeout=0.0))

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        try:
            self._socket.sendall(body or b"")
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses a body answers before it hangs up: the answer tells, or is missed when it is read.
            self._torn = True

    def head(self) -> tuple[int, bool, dict[str, str]]:
        """Status, whether the connection stays, and the headers by their names in lower case, of the next answer."""
        while True:
            first, *others = self._head().split("\n")
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
                raise self._broken(f"the answer begins with {first[:80]!r}")
            # What begins with 1 only says that the answer is still to come.
            if rest[0] != "1":
                parts = [line.partition(":") for line in others]
                headers = {name.lower(): value.strip() for name, _, value in parts}
                stays = version != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
                return int(rest[:3]), stays and not self._torn, headers

    def close(self) -> None:
        """Hang up."""
        self.reader.close()
        self._socket.close()

    def _head(self) -> str:
        """The lines up to an empty one, each ended as text is."""
        # Nearly every head is in the first packet.
        end = self.reader.peek(1).find(b"\r\n\r\n")
        raw = self.reader.read(end + 4) if end >= 0 else self._lines()
        return raw.decode("latin-1").replace("\r\n", "\n").rstrip("\n")

    def _lines(self) -> bytes:
        lines = b""
        while len(lines) < _HEAD:
            line = self.reader.readline(_HEAD)
            if not line:
                raise self._broken("it hung up")
            lines += line
            if line in (b"\r\n", b"\n"):
                return lines
        raise self._broken("the answer has a head without end")

    def _broken(self, what: str) -> ConnectionClosedError:
        return ConnectionClosedError(endpoint_url=self._origin.url, error=what)


class Asked:
    """A request whose answer is to come."""

    def __init__(self, wires: Wires, origin: Origin, wire: _Wire) -> None:
        self._wires = wires
        self._origin = origin
        self._wire = wire

    def answer(self) -> Answer:
        """Read the head of the answer. Raises botocore's errors of connections, and OSError."""
        try:
            return Answer(self._wires, self._origin, self._wire)
        except BaseException:
            self._wire.close()
            raise

    def close(self) -> None:
        """Give the answer up."""
        self._wire.close()


class Answer:
    """The answer to a request: its head, and its body as a stream that is read once."""

    def __init__(self, wires: Wires, origin: Origin, wire: _Wire) -> None:
        self._wires = wires
        self._origin = origin
        self._wire = wire
        self.status, self._stays, self.headers = wire.head()
        length = self.headers.get("content-length", "")
        plain = length.isdecimal() and "transfer-encoding" not in self.headers
        self.length = int(length) if plain else None
        """Bytes of the body; None when the head does not say."""
        self._left = self.length
        """Bytes that are still to come."""

    def readinto(self, view: memoryview) -> int:
        """Read up to as many bytes as fit; 0 at the end, or when the server hung up."""
        assert self._left is not None, "a body of unknown length is not read"
        count = self._wire.reader.readinto(view[: self._left])
        self._left -= count
        return count

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; none at the end, or when the server hung up."""
        assert self._left is not None, "a body of unknown length is not read"
        content = self._wire.reader.read(min(count, self._left))
        self._left -= len(content)
        return content

    def close(self) -> None:
        """Keep the connection when the body was read to its end; any other cannot be used again."""
        if self._left == 0 and self._stays:
            self._wires._keep(self._origin, self._wire)
        else:
            self._wire.close()
