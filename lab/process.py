"""Long-running host processes: started detached, found again by pidfile, ended for certain.

There is no supervisor. A pidfile holds the number and the start time, so that a number that the kernel gave to
somebody else after a reboot is never taken for ours.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.report import LabError
from lab.run import SYSTEM_PATH, tail


@dataclass
class Process:
    """One program under a name; its log and pidfile stand in `state`.

    Args:
        name: What it is called in `status`, `logs`, `stop` and `start`.
        argv: Program and arguments; each is written out by str().
        state: Folder that holds `logs/` and `run/`.
        env: Its environment, beside PATH and HOME. It gets nothing else: a proxy of this computer is not its business.
        tied: Whether it must die with the process that started it (for tests that may be killed).
    """

    name: str
    argv: Sequence[object]
    state: Path
    env: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def log(self) -> Path:
        """The file that gets all that it prints."""
        return self.state / "logs" / f"{self.name}.log"

    @property
    def pidfile(self) -> Path:
        """The file that tells a later command which process this is."""
        return self.state / "run" / f"{self.name}.json"

    def start(self) -> None:
        """Start it unless it runs."""
        if self.pid() is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.pidfile.parent.mkdir(parents=True, exist_ok=True)
        before = tie(os.getpid()) if self.tied else []
        environment = {"PATH": f"{self.state / 'bin'}:{SYSTEM_PATH}", "HOME": str(self.state), **self.env}
        with self.log.open("ab") as out:
            self._child = subprocess.Popen(
                [*before, *map(str, self.argv)], env=environment, cwd="/", stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        record = {"pid": self._child.pid, "started": started(self._child.pid), "program": str(self.argv[0])}
        partial = self.pidfile.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.rename(self.pidfile)

    def pid(self) -> int | None:
        """Return its number, or None when it does not run."""
        if self._child is not None:
            return self._child.pid if self._child.poll() is None else None
        return recorded(self.pidfile)

    def stop(self, grace: float = 10) -> None:
        """End it and all that it started in its session: politely, and after `grace` seconds for certain."""
        if (pid := self.pid()) is not None:
            end([pid], grace)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if self._child is not None:
            self._child.wait(timeout=10)
            self._child = None
        self.pidfile.unlink(missing_ok=True)

    def wait(self, ready: Callable[[], bool], timeout: float, interval: float = 0.05) -> None:
        """Wait until `ready` says so.

        Raises:
            LabError: It ended, or was not ready in time; the message ends with its last lines.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if self.pid() is None:
                raise LabError(f"{self.name} ended while starting:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} is not ready after {timeout:.0f} s:\n{self._last_words()}")
            time.sleep(interval)

    def _last_words(self) -> str:
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"{tail(said)}\n  all of it: cat {self.log}"


def tie(parent: int) -> list[str]:
    """Return the words before a program that make it die with its parent.

    The kernel tells of a parent's death only to those who asked while it lived: whoever comes too late to ask finds
    another parent, and does not start.
    """
    alive = '[ "$PPID" = "$0" ] && exec "$@"'
    return ["setpriv", "--pdeathsig", "TERM", "sh", "-c", alive, str(parent)]


def recorded(pidfile: Path) -> int | None:
    """Return the number in a pidfile if that very process still runs."""
    try:
        record = json.loads(pidfile.read_text())
    except (FileNotFoundError, ValueError):
        return None
    pid: int = record["pid"]
    return pid if record["started"] is not None and started(pid) == record["started"] else None


def started(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None when it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def end(pids: Sequence[int], grace: float) -> None:
    """End processes: SIGTERM, then SIGKILL for those that are still there after `grace` seconds."""
    born = {pid: started(pid) for pid in pids}
    for sig, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        alive = [pid for pid in pids if born[pid] is not None and started(pid) == born[pid]]
        if not alive or (sig is signal.SIGTERM and not grace):
            continue
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(started(pid) == born[pid] for pid in alive):
            time.sleep(0.02)


def command(pid: int) -> str:
    """Return a process's command line, for messages and for telling ours from others'."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def everyone() -> list[int]:
    """Return the numbers of all processes."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
