"""MB/s of the store, up and down, beside `rclone copy` on the same server: `python -m bench.store [--json] [--mib N]`.

Both move the same bytes between the same disk and the same `rclone serve s3`, in turns; the figures are medians.
The store also makes or checks a sha256 of each byte and writes or reads a manifest; rclone compares MD5s.
The time that the rclone program takes to start is measured and taken off its times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trimtab_api.contract import Connection
from trimtab_store import S3, connect, fetch, publish

RCLONE = Path(sys.executable).parent / "rclone"
KEY, SECRET, BUCKET = "BENCHKEY", "benchsecret", "bench"
MB = 1_000_000


class Load(NamedTuple):
    """What is moved."""

    name: str
    files: int
    size: int


class Line(NamedTuple):
    """One comparison."""

    load: str
    direction: str
    ours: float
    rclone: float

    @property
    def ratio(self) -> float:
        return self.ours / self.rclone


def main() -> int:
    """Measure and print."""
    options = _options()
    loads = [Load("one large file", 1, options.mib << 20), Load("many small files", 1000, 64 << 10)]
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-", dir=options.dir) as place, _server(Path(place)) as port:
        lines = [line for load in loads for line in _compare(load, Path(place), port, options.rounds)]
    if options.json:
        print(json.dumps([{**line._asdict(), "ratio": line.ratio} for line in lines]))
    else:
        print(f"{'':18}{'':6}{'store MB/s':>12}{'rclone MB/s':>12}{'ratio':>8}")
        for line in lines:
            print(f"{line.load:18}{line.direction:6}{line.ours:12.0f}{line.rclone:12.0f}{line.ratio:8.2f}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.store", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--mib", type=int, default=1024, help="size of the large file")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--dir", help="where to work, when the temporary folder's disk is too small")
    return parser.parse_args()


def _compare(load: Load, place: Path, port: int, rounds: int) -> Iterator[Line]:
    source = place / "source"
    for number in range(load.files):
        (source / f"{number % 10}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 10}" / f"{number}.bin").write_bytes(os.urandom(load.size))
    started = statistics.median(_seconds(lambda: _run("version")) for _ in range(3))
    connection = Connection(endpoint=f"http://127.0.0.1:{port}", path_style=True, credentials_dir=str(place / "keys"))
    times: dict[str, list[float]] = {"up": [], "down": [], "rclone up": [], "rclone down": []}
    with connect(connection) as s3:
        for number in range(rounds):
            for name, seconds in _round(s3, place, port, odd=bool(number % 2)).items():
                times[name].append(seconds - (started if name.startswith("rclone") else 0))
    shutil.rmtree(source)
    speed = {name: load.files * load.size / MB / statistics.median(seconds) for name, seconds in times.items()}
    yield Line(load.name, "up", speed["up"], speed["rclone up"])
    yield Line(load.name, "down", speed["down"], speed["rclone down"])


def _round(s3: S3, place: Path, port: int, *, odd: bool) -> dict[str, float]:
    """Each way once; who goes first changes from round to round."""
    remote, flags = f":s3:{BUCKET}/theirs", _remote(port)
    moves: list[tuple[str, Callable[[], object]]] = [
        ("up", lambda: publish(s3, place / "source", f"s3://{BUCKET}/ours", {})),
        ("rclone up", lambda: _run("copy", place / "source", remote, *flags)),
        ("down", lambda: fetch(s3, f"s3://{BUCKET}/ours", place / "fetched")),
        ("rclone down", lambda: _run("copy", remote, place / "copied", *flags)),
    ]
    if odd:
        moves = [moves[1], moves[0], moves[3], moves[2]]
    times = {}
    for name, move in moves:
        os.sync()
        times[name] = _seconds(move)
    for prefix in ("ours", "theirs"):
        s3.delete_prefix(f"s3://{BUCKET}/{prefix}")
    for folder in ("fetched", "copied"):
        shutil.rmtree(place / folder)
    return times


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _run(*arguments: str | Path) -> None:
    environment = {"RCLONE_CONFIG": os.devnull, "HOME": os.devnull, "PATH": os.environ["PATH"]}
    subprocess.run([RCLONE, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=600)


def _remote(port: int) -> list[str]:
    return [
        *("--s3-provider", "Rclone", "--s3-endpoint", f"http://127.0.0.1:{port}"),
        *("--s3-access-key-id", KEY, "--s3-secret-access-key", SECRET),
    ]


@contextmanager
def _server(place: Path) -> Iterator[int]:
    (place / "served" / BUCKET).mkdir(parents=True)
    (place / "keys").mkdir()
    (place / "keys" / "AWS_ACCESS_KEY_ID").write_text(KEY)
    (place / "keys" / "AWS_SECRET_ACCESS_KEY").write_text(SECRET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command: list[str | Path] = [RCLONE, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}"]
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, place / "served"], stdout=log, stderr=log)
    try:
        _wait_for(port, place / "server.log")
        yield port
    finally:
        server.terminate()
        server.wait(10)


def _wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"rclone does not listen: {log.read_text()}")


if __name__ == "__main__":
    sys.exit(main())
