"""Artifacts on the local disk, found by digest, shared by every process of the node.

Below the root stand `sha256-HEX/` folders, complete from the moment they can be seen, and `locks/` with one file
for each. Its lock is exclusive while the entry is fetched or evicted and shared while it is in use; the kernel lets
go of it whatever becomes of the process. Its content is the number of bytes being fetched, its time of change the
entry's last use. It is never deleted: who waits for the lock of a deleted file waits beside everybody else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

from trimtab_store.artifact import Identity
from trimtab_store.connection import S3
from trimtab_store.download import SPARE, Wanted, bring, contents, settle
from trimtab_store.errors import DiskFull, StorageUnreachable, UnsafeFormat, converted_disk, human
from trimtab_store.progress import Progress

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_POLL = 0.1
"""Seconds between two looks at a lock that another process holds."""


class CacheEntry:
    """An artifact in the cache, kept there until `release` or the end of this process."""

    def __init__(self, path: Path, digest: str, lock: _Lock) -> None:
        self.path = path
        """The folder with the files; read only."""
        self.digest = digest
        """sha256:HEX."""
        self._lock = lock

    def release(self) -> None:
        """Allow the entry to be evicted; calling it again does nothing."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Cache:
    """A folder of artifacts, each under `sha256-HEX/` (`sha256-HEX-safetensors/` where pickles were left out).

    `limit_bytes`: most bytes of all entries together; None leaves it to the disk.
    """

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self._root = root
        self._limit = limit_bytes
        self._locks = root / "locks"
        with converted_disk(root):
            self._locks.mkdir(parents=True, exist_ok=True)

    def get(
        self,
        s3: S3,
        uri: str,
        *,
        expected_digest: str | None = None,
        safetensors_only: bool = False,
        foreign: bool = False,
        progress: Progress | None = None,
        wait: float = 3600.0,
    ) -> CacheEntry:
        """The artifact at `uri`, fetched when it is not here yet, leased to the caller.

        `wait`: seconds to wait for another process that is fetching the same, then StorageUnreachable.
        Raises what `fetch` raises, and UnsafeFormat with `safetensors_only`.
        """
        if expected_digest is not None and (entry := self._lease(expected_digest, safetensors_only)):
            return entry
        identity = settle(s3, uri, expected_digest=expected_digest, foreign=foreign)
        files = contents(uri, identity)
        if safetensors_only:
            files = _without_pickles(uri, files)
        deadline = time.monotonic() + wait
        while True:
            self._ensure(s3, identity, files, self._name(identity.digest, safetensors_only), progress, deadline)
            # Between fetching and leasing the lock is free for a moment, in which another process may evict.
            if entry := self._lease(identity.digest, safetensors_only):
                return entry
            time.sleep(_POLL / 10)

    def _lease(self, digest: str, safetensors_only: bool) -> CacheEntry | None:
        """The entry, in use from now on; None when it is not here or is being fetched or evicted."""
        name = self._name(digest, safetensors_only)
        path = self._root / name
        if not path.is_dir():
            return None
        lock = _Lock(self._locks / name)
        if lock.acquire(fcntl.LOCK_SH) and path.is_dir():
            lock.touch()
            return CacheEntry(path, digest, lock)
        lock.close()
        return None

    def _ensure(
        self,
        s3: S3,
        identity: Identity,
        files: list[Wanted],
        name: str,
        progress: Progress | None,
        deadline: float,
    ) -> None:
        """Have the entry on the disk, by fetching it or by waiting for who does."""
        path = self._root / name
        size = sum(file.size for file in files)
        with self._alone(path, deadline) as lock:
            if lock is None or path.is_dir():
                return
            self._sweep(name)
            with self._alone(self._locks / "all", deadline):
                self._make_room(size, besides=name)
                lock.write(size)
            try:
                bring(s3, identity, files, path, progress=progress, durable=True)
            finally:
                lock.write(0)

    @contextmanager
    def _alone(self, path: Path, deadline: float) -> Iterator[_Lock | None]:
        """The lock of an entry; None when the entry is there by now, so that there is nothing to wait for."""
        lock = _Lock(self._locks / path.name)
        try:
            while not lock.acquire(fcntl.LOCK_EX):
                if path.is_dir():
                    yield None
                    return
                if time.monotonic() > deadline:
                    problem = "another process on this node has not fetched it in time"
                    raise StorageUnreachable(str(path), problem, "see that process, or wait")
                time.sleep(_POLL)
            yield lock
        finally:
            lock.close()

    def _sweep(self, name: str) -> None:
        """Remove what a killed process left of the same entry; its lock is ours, so nobody writes there."""
        for left in self._root.glob(f".{name}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def _make_room(self, size: int, *, besides: str) -> None:
        """Evict what was longest unused until `size` more bytes fit the limit and the disk."""
        if self._limit is not None and size > self._limit:
            raise self._no_room(size, size - self._limit)
        entries, room = self._survey(besides)
        for entry in sorted(entries, key=lambda each: each.used):
            if room.excess(size) <= 0:
                return
            if self._evict(entry.name):
                room = room.with_more(entry.size)
        if (excess := room.excess(size)) > 0:
            raise self._no_room(size, excess)

    def _no_room(self, size: int, excess: int) -> DiskFull:
        bound = "the disk" if self._limit is None else f"the cache's limit of {human(self._limit)} or the disk"
        problem = f"{human(size)} more do not fit {bound}: {human(excess)} are missing beside what is in use"
        remedy = "raise the pod's ephemeral-storage or the cache's limit, or release entries"
        return DiskFull(str(self._root), problem, remedy, excess)

    def _survey(self, besides: str) -> tuple[list[_Held], _Room]:
        """The entries, and the room there is when all that is being fetched has come."""
        entries: list[_Held] = []
        coming = arrived = 0
        for file in self._locks.iterdir():
            path = self._root / file.name
            if path.is_dir():
                entries.append(_Held(file.name, _folder_size(path), file.stat().st_mtime_ns))
            elif file.name != besides and (planned := self._planned(file)):
                coming += planned
                arrived += sum(_folder_size(partial) for partial in self._root.glob(f".{file.name}.*"))
        with converted_disk(self._root):
            disk = shutil.disk_usage(self._root).free - SPARE - max(coming - arrived, 0)
        limit = None if self._limit is None else self._limit - coming - sum(entry.size for entry in entries)
        return entries, _Room(disk, limit)

    def _planned(self, file: Path) -> int:
        """The bytes that somebody is fetching under this lock; what a killed process left there is removed."""
        lock = _Lock(file)
        try:
            if not lock.acquire(fcntl.LOCK_EX):
                return lock.read()
            self._sweep(file.name)
            return 0
        finally:
            lock.close()

    def _evict(self, name: str) -> bool:
        """Remove an entry unless somebody uses it."""
        lock = _Lock(self._locks / name)
        try:
            if not lock.acquire(fcntl.LOCK_EX):
                return False
            # Out of sight first: a folder that is half deleted must not be found.
            gone = self._root / f".{name}.evicted"
            with converted_disk(gone):
                (self._root / name).rename(gone)
                shutil.rmtree(gone)
            return True
        finally:
            lock.close()

    @staticmethod
    def _name(digest: str, safetensors_only: bool) -> str:
        return digest.replace(":", "-") + ("-safetensors" if safetensors_only else "")


class _Held(NamedTuple):
    """An entry on the disk."""

    name: str
    size: int
    used: int


class _Room(NamedTuple):
    """Bytes that still fit: on the disk, and below the limit when there is one."""

    disk: int
    limit: int | None

    def excess(self, size: int) -> int:
        """Bytes by which `size` more would be too much."""
        return size - (self.disk if self.limit is None else min(self.disk, self.limit))

    def with_more(self, size: int) -> _Room:
        """The room after an entry of this size has gone."""
        return _Room(self.disk + size, None if self.limit is None else self.limit + size)


class _Lock:
    """A file whose lock belongs to this object: not to the process, so that threads exclude each other too."""

    def __init__(self, path: Path) -> None:
        with converted_disk(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def acquire(self, kind: int) -> bool:
        """Try to take the lock: LOCK_SH or LOCK_EX."""
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def touch(self) -> None:
        """Note that the entry was used now."""
        os.utime(self._descriptor)

    def write(self, size: int) -> None:
        """Note how many bytes are being fetched; 0 when none are."""
        os.ftruncate(self._descriptor, 0)
        if size:
            os.pwrite(self._descriptor, str(size).encode(), 0)

    def read(self) -> int:
        """The bytes that the holder is fetching."""
        return int(os.pread(self._descriptor, 32, 0) or b"0")

    def close(self) -> None:
        """Let go of the lock; calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _without_pickles(uri: str, files: list[Wanted]) -> list[Wanted]:
    pickles = [file.path for file in files if PurePosixPath(file.path).suffix in _PICKLES]
    if pickles and not any(file.path.endswith(".safetensors") for file in files):
        problem = f"weights are there only as pickle ({pickles[0]}), which runs code when it is opened"
        raise UnsafeFormat(uri, problem, "save them with safe_serialization=True")
    return [file for file in files if file.path not in set(pickles)]


def _folder_size(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # What another process is fetching gets its final name while it is measured here.
            with suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size
