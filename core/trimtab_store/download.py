"""From object storage into a folder: parallel ranges, verified while they are written, all or nothing."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from trimtab_api.contract import MANIFEST_NAME
from trimtab_store.artifact import Identity, identify
from trimtab_store.connection import S3, SmallObject
from trimtab_store.errors import (
    DigestMismatch,
    LocalFileFailed,
    NotAnArtifact,
    ObjectMissing,
    converted_disk,
    disk_full,
    existing,
)
from trimtab_store.gang import TURN, Gang, OrderedDigest
from trimtab_store.location import join
from trimtab_store.patience import Stopped
from trimtab_store.progress import Meter, Progress

_THREADS = 6
_PART = 8 << 20
"""Bytes of a range; each thread holds one."""
_SMALL = 1 << 20
"""Bytes of a file up to which it is brought in a lot."""
_LOT_THREADS = 2
_LOT = 32
"""Files of a lot."""
SPARE = 16 << 20
"""Bytes that stay free on the disk beyond what is fetched."""


class Wanted(NamedTuple):
    """A file to bring, and what it must be: by sha256 where a manifest vouches for it, else by ETag."""

    uri: str
    path: str
    size: int
    sha256: str | None = None
    etag: str | None = None


def fetch(
    s3: S3,
    uri: str,
    into: Path,
    *,
    expected_digest: str | None = None,
    only: Iterable[str] | None = None,
    foreign: bool = False,
    progress: Progress | None = None,
) -> str:
    """Bring the artifact at `uri` into the folder `into`, which appears complete or not at all; returns its digest.

    `only`: glob patterns of the paths wanted. `foreign`: take a prefix without manifest as it is listed.
    Raises NotAnArtifact, DigestMismatch, ObjectMissing, DiskFull, UnsafePath, StorageUnreachable, ...
    """
    identity = settle(s3, uri, expected_digest=expected_digest, foreign=foreign)
    patterns = ("*",) if only is None else tuple(only)
    files = [file for file in contents(uri, identity) if any(fnmatchcase(file.path, each) for each in patterns)]
    if not files and identity.files:
        problem = f"none of its {len(identity.files)} files matches {', '.join(patterns)}"
        raise ObjectMissing(uri, problem, "correct the uri")
    bring(s3, identity, files, into, progress=progress)
    return identity.digest


def settle(s3: S3, uri: str, *, expected_digest: str | None, foreign: bool) -> Identity:
    """What will be fetched from `uri`. Raises NotAnArtifact unless `foreign`, DigestMismatch, ..."""
    identity = identify(s3, uri)
    if identity.manifest is None and not foreign:
        problem = f"there is no {MANIFEST_NAME}, so nothing says that it is complete"
        raise NotAnArtifact(uri, problem, "name an artifact's prefix, or wait for its upload")
    if expected_digest is not None and identity.digest != expected_digest:
        problem = f"its digest is {identity.digest}, wanted is {expected_digest}"
        raise DigestMismatch(uri, problem, "restore what was there, or take the new digest")
    return identity


def contents(uri: str, identity: Identity) -> list[Wanted]:
    """The files of what was settled."""
    if identity.manifest is not None:
        return [Wanted(join(uri, file.path), file.path, file.size, file.sha256) for file in identity.manifest.files]
    if identity.single:
        return [Wanted(uri, file.path, file.size, etag=file.etag) for file in identity.foreign]
    return [Wanted(join(uri, file.path), file.path, file.size, etag=file.etag) for file in identity.foreign]


def bring(
    s3: S3,
    identity: Identity,
    files: list[Wanted],
    into: Path,
    *,
    progress: Progress | None = None,
    durable: bool = False,
) -> None:
    """Bring files into a folder by way of a sibling that is renamed at the end.

    `durable`: every byte is on the disk before the folder appears, for folders that outlive a crash of the node.
    """
    _check_free(into, sum(file.size for file in files))
    partial = into.with_name(f".{into.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    with converted_disk(into):
        if into.exists() and (not into.is_dir() or any(into.iterdir())):
            raise LocalFileFailed(str(into), "there is something already", "name a folder that does not exist")
        partial.mkdir(parents=True)
    try:
        _receive_all(s3, files, partial, Meter(sum(file.size for file in files), progress), durable=durable)
        with converted_disk(into):
            if identity.manifest is not None:
                (partial / MANIFEST_NAME).write_bytes(identity.manifest.encoded())
                (partial / MANIFEST_NAME).chmod(0o644)
            _open_to_readers(partial, durable=durable)
            partial.rename(into)
            if durable:
                _sync_folder(into.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(into: Path, needed: int) -> None:
    with converted_disk(into):
        free = shutil.disk_usage(existing(into)).free
    if needed + SPARE > free:
        raise disk_full(into, needed + SPARE, free)


def _receive_all(s3: S3, files: list[Wanted], folder: Path, meter: Meter, *, durable: bool) -> None:
    with converted_disk(folder):
        for parent in {(folder / file.path).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
    small = [file for file in files if file.size <= min(_SMALL, _PART)]
    large = [file for file in files if file.size > min(_SMALL, _PART)]
    left = _receive_lots(s3, small, folder, meter, durable=durable)
    _receive_ranges(s3, [*left, *large], folder, meter, durable=durable)


def _receive_lots(s3: S3, files: list[Wanted], folder: Path, meter: Meter, *, durable: bool) -> list[Wanted]:
    """Bring small files as long as all goes well: a thread takes a lot of them at a time and asks for several at once.

    Returns those that are left, because something did not.
    """
    left: list[Wanted] = []

    def work(lot: list[Wanted]) -> None:
        came = 0 if left else _receive_lot(s3, lot, folder, meter, gang.stop, durable=durable)
        left.extend(lot[came:])

    gang: Gang[list[Wanted]] = Gang(_LOT_THREADS, work)
    gang.run(files[first : first + _LOT] for first in range(0, len(files), _LOT))
    return left


def _receive_lot(s3: S3, lot: list[Wanted], folder: Path, meter: Meter, stop: threading.Event, *, durable: bool) -> int:
    """Bring a lot of small files; returns how many of them came."""
    objects = [SmallObject(file.uri, file.size, file.etag) for file in lot]
    buffer = memoryview(bytearray(max(file.size for file in lot)))
    came = 0
    with closing(s3.read_ahead(objects, buffer, stop)) as contents:
        for content in contents:
            file = lot[came]
            _check(file, hashlib.sha256(content).hexdigest())
            _write_whole(f"{folder}/{file.path}", content, durable=durable)
            meter.add(len(content))
            came += 1
    return came


def _receive_ranges(s3: S3, files: list[Wanted], folder: Path, meter: Meter, *, durable: bool) -> None:
    """Bring large files: each thread takes a range at a time."""
    held = threading.local()

    def work(part: _Part) -> None:
        if not hasattr(held, "buffer"):
            held.buffer = memoryview(bytearray(_PART))
        meter.add(part.receiving.receive(part.number, held.buffer))

    gang: Gang[_Part] = Gang(_THREADS, work)
    begun: list[_Receiving] = []

    def parts() -> Iterator[_Part]:
        for file in files:
            receiving = _Receiving(s3, file, folder / file.path, gang.stop, durable=durable)
            begun.append(receiving)
            for number in range(receiving.count):
                yield _Part(receiving, number)

    try:
        gang.run(parts())
    finally:
        for receiving in begun:
            receiving.close()


class _Receiving:
    """One file on its way, shared by the threads that receive its parts."""

    def __init__(self, s3: S3, file: Wanted, target: Path, stop: threading.Event, *, durable: bool) -> None:
        self._s3 = s3
        self._file = file
        self._target = target
        self._stop = stop
        self._durable = durable
        self._lock = threading.Lock()
        self._digest = OrderedDigest(stop)
        self.count = max(-(-file.size // _PART), 1)
        """Number of ranges."""
        self._missing = self.count
        self._answered = threading.Event()
        with converted_disk(target):
            self._descriptor = _create(target)
            if file.size:
                # Threads that write beyond the end wait for each other in the kernel, and burn a core while they do.
                os.posix_fallocate(self._descriptor, 0, file.size)

    def receive(self, number: int, buffer: memoryview) -> int:
        """Read, write and digest one range; the thread that brings the last one verifies the file."""
        # Some servers digest the whole object for their first answer's ETag: asked for six ranges at once, six times.
        while number > 0 and not self._answered.wait(TURN):
            if self._stop.is_set():
                raise Stopped
        offset = number * _PART
        view = buffer[: min(_PART, self._file.size - offset)]
        self._s3.read_into(self._file.uri, offset, view, etag=self._file.etag, stop=self._stop)
        self._answered.set()
        with converted_disk(self._target):
            _write(self._descriptor, view, offset)
        if self._file.sha256 is not None:
            self._digest.feed(offset, view)
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if last:
            self._verify()
        return len(view)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _verify(self) -> None:
        _check(self._file, self._digest.hexdigest())
        with converted_disk(self._target):
            if self._durable:
                os.fsync(self._descriptor)
            self.close()


class _Part(NamedTuple):
    """A range of a file."""

    receiving: _Receiving
    number: int


def _check(file: Wanted, found: str) -> None:
    """Raise DigestMismatch when the manifest says another sha256."""
    if file.sha256 is not None and found != file.sha256:
        problem = f"its sha256 is {found}, the manifest says {file.sha256}"
        raise DigestMismatch(file.uri, problem, "publish the artifact again; nothing of it was used")


def _create(target: Path | str) -> int:
    """Create a file that everybody may read, whatever the umask; returns its descriptor."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    os.fchmod(descriptor, 0o644)
    return descriptor


def _write_whole(target: str, content: memoryview, *, durable: bool) -> None:
    with converted_disk(Path(target)):
        descriptor = _create(target)
        try:
            _write(descriptor, content, 0)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _open_to_readers(folder: Path, *, durable: bool) -> None:
    """Let every user look, whatever the umask: the engine runs under another uid than the agent."""
    for name, _, _ in os.walk(folder):
        Path(name).chmod(0o755)
        if durable:
            _sync_folder(Path(name))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
