"""TCP ports: free ones, and by whose process a wanted one is taken."""

import contextlib
import socket
from pathlib import Path

from lab import process
from lab.report import LabError


class PortTaken(LabError):
    """Another program has a port that the lab needs; nothing that the lab can do by itself helps."""


def free(count: int, address: str = "127.0.0.1") -> list[int]:
    """Return ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def open_at(address: str, port: int) -> bool:
    """Tell whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def claim(wanted: dict[str, tuple[str, int]]) -> None:
    """See that each wanted address and port is free.

    Raises:
        PortTaken: One is taken; the message names the port, what it is for, and the process that has it.
    """
    taken = []
    for purpose, (address, port) in wanted.items():
        for pid in listeners(address, port):
            who = f"process {pid} ({process.command(pid)[:120]})" if pid else "a process that cannot be seen"
            taken.append(f"port {port}, wanted for {purpose}, is taken by {who}")
    if taken:
        raise PortTaken("\n".join([*taken, "end what holds them, then try again"]))


def listeners(address: str, port: int) -> list[int]:
    """Return the processes that listen on a port at this address or at all addresses; 0 for one that cannot be seen."""
    inodes = {
        inode
        for table in ("tcp", "tcp6")
        for local, found, inode in _listening(Path(f"/proc/net/{table}"))
        if found == port and (local in ("*", address) or address == "0.0.0.0")  # noqa: S104 (compared, not bound)
    }
    if not inodes:
        return []
    return sorted({pid for pid in process.everyone() if inodes & _sockets(pid)}) or [0]


def _listening(table: Path) -> list[tuple[str, int, str]]:
    found = []
    for line in table.read_text().splitlines()[1:] if table.exists() else []:
        fields = line.split()
        if fields[3] != "0A":
            continue
        address, _, port = fields[1].rpartition(":")
        found.append((_address(address), int(port, 16), fields[9]))
    return found


def _address(written: str) -> str:
    # The kernel writes each 32-bit word in the machine's own byte order.
    if not int(written, 16):
        return "*"
    last = bytes.fromhex(written[-8:])[::-1]
    return ".".join(map(str, last))


def _sockets(pid: int) -> set[str]:
    found = set()
    # Processes and their files come and go while we look.
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(entry.readlink().name.removeprefix("socket:[").removesuffix("]"))
    return found
