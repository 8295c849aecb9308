"""The wire between the operator and the API server, which can be cut, and go dead without a word."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PIECE = 1 << 16


@dataclass(eq=False)
class Connection:
    """Two sockets, the operator's and the API server's, and whether bytes pass."""

    ends: tuple[socket.socket, socket.socket]
    dead: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Pass bytes both ways until one end closes."""
        for source, sink in (self.ends, self.ends[::-1]):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def close(self) -> None:
        """Close both ends at once, as a broken line does."""
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                if not self.dead.is_set():
                    sink.sendall(piece)
        self.close()


class Wire:
    """Passes TLS through as it is: the certificate is for 127.0.0.1, whatever the port."""

    def __init__(self, server: str) -> None:
        """Listen on a free port for a server such as https://127.0.0.1:6443."""
        parts = urlsplit(server)
        self._target = (parts.hostname or "", parts.port or 443)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[Connection] = set()
        self._cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def server(self) -> str:
        """Where the operator finds the API server."""
        return f"https://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._cut = True
        for connection in list(self._connections):
            connection.close()
        self._connections.clear()

    def mend(self) -> None:
        """Take connections again."""
        self._cut = False

    def numb(self) -> None:
        """Let nothing through on the connections that there are; none of them is told, and new ones work."""
        for connection in self._connections:
            connection.dead.set()

    def close(self) -> None:
        """The end."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                end, _ = self._listener.accept()
                if self._cut:
                    end.close()
                    continue
                try:
                    other = socket.create_connection(self._target, timeout=5)
                except OSError:
                    end.close()
                    continue
                other.settimeout(None)
                connection = Connection((end, other))
                self._connections.add(connection)
                connection.start()


@contextmanager
def wired(kubeconfig: Path, server: str, folder: Path) -> Iterator[tuple[Wire, Path]]:
    """A wire to the server of a kubeconfig, and a kubeconfig in the folder that goes through it."""
    wire = Wire(server)
    through = folder / "wired.kubeconfig"
    through.write_text(kubeconfig.read_text().replace(server, wire.server))
    try:
        yield wire, through
    finally:
        wire.close()
