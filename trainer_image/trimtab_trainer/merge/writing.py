"""The pipeline: the base is read ahead, blocks are changed, files are written and stored behind, all at once."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import torch

from trimtab_api.contract import ManifestFile
from trimtab_trainer.merge.checkpoint import Checkpoint
from trimtab_trainer.merge.destination import Destination, Partial
from trimtab_trainer.merge.units import Piece, Plan, Shard, place

log = logging.getLogger(__name__)

_BEHIND = 4
"""Pieces that may wait to be written: they bound the memory."""

Report = Callable[[int, int], None]
"""(files done, files in all)"""


def write(plan: Plan, base: Checkpoint, destination: Destination, partial: Partial, report: Report) -> Partial:
    """Make and store every file that is not there yet. Returns the record of all files.

    Raises what reading, changing and storing raise; what is stored by then is remembered.
    """
    threads = torch.get_num_threads()
    # Reading, hashing and writing want cores too, and threads that wait for each other at small blocks burn them.
    torch.set_num_threads(max(1, threads // 2))
    storage = _Storage(destination, partial, len(plan.shards), report)
    done = {file.path for file in partial.files}
    skipped = {number for number, shard in enumerate(plan.shards) if shard.name in done}
    last_uses = plan.last_uses()
    writer = _Writer(plan.shards, destination, storage)
    try:
        for number, (unit, shards) in enumerate(place(plan)):
            if not skipped.issuperset(shards):
                for output, piece in unit.produce(base):
                    if shards[output] not in skipped:
                        writer.put(shards[output], piece)
            for file in {info.file for info in unit.sources}:
                if last_uses[file] == number and file not in partial.checked:
                    base.finish(file)
                    storage.checked.append(file)
        writer.finish()
        return storage.finish()
    finally:
        writer.close()
        storage.close()
        torch.set_num_threads(threads)


class _Storage:
    """Stores finished files one after the other while the next one is made."""

    def __init__(self, destination: Destination, partial: Partial, total: int, report: Report):
        self.checked = list(partial.checked)
        self._destination = destination
        self._partial = partial
        self._total = total
        self._report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._latest: Future[None] | None = None
        report(len(partial.files), total)

    def take(self, name: str, sha256: str | None) -> None:
        """Store a file as soon as the one before it is stored: no more than two wait on the disk."""
        self._wait()
        self._latest = self._pool.submit(self._store, name, sha256)

    def finish(self) -> Partial:
        """The record, when all is stored."""
        self._wait()
        return self._partial.model_copy(update={"checked": self.checked})

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        if self._latest is not None:
            self._latest.result()

    def _store(self, name: str, sha256: str | None) -> None:
        file: ManifestFile = self._destination.store(name, sha256)
        files = [*self._partial.files, file]
        # What was checked may grow meanwhile; the list is copied so that the record is of one moment.
        self._partial = self._partial.model_copy(update={"files": files, "checked": list(self.checked)})
        self._destination.remember(self._partial)
        log.info("stored %s (%d of %d files)", name, len(files), self._total)
        self._report(len(files), self._total)


class _Writer:
    """Writes pieces into files in its own thread, in the order they were put."""

    def __init__(self, shards: list[Shard], destination: Destination, storage: _Storage):
        self._shards = shards
        self._destination = destination
        self._storage = storage
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()
        self._file: IO[bytes] | None = None
        self._current = -1
        self._sha256: Any = None

    def put(self, shard: int, piece: Piece) -> None:
        """Write a piece behind the ones before it; a new shard begins a new file."""
        if shard != self._current:
            self.finish()
            self._begin(shard)
        self._submit(_bytes(piece))

    def finish(self) -> None:
        """End the file and have it stored."""
        if self._file is None:
            return
        while self._pending:
            self._pending.popleft().result()
        self._file.close()
        self._file = None
        self._storage.take(self._shards[self._current].name, self._sha256.hexdigest() if self._sha256 else None)

    def close(self) -> None:
        """Let go of thread and file, whatever happened."""
        self._pool.shutdown(cancel_futures=True)
        if self._file is not None:
            self._file.close()

    def _begin(self, shard: int) -> None:
        self._current = shard
        self._sha256 = None if self._destination.hashes else hashlib.sha256()
        self._destination.stage.mkdir(parents=True, exist_ok=True)
        self._file = (self._destination.stage / self._shards[shard].name).open("wb", buffering=0)
        self._submit(memoryview(self._shards[shard].header))

    def _submit(self, content: memoryview) -> None:
        if len(self._pending) >= _BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, content))

    def _write(self, content: memoryview) -> None:
        assert self._file is not None
        if self._sha256 is not None:
            self._sha256.update(content)
        while content:
            content = content[self._file.write(content) :]


def _bytes(piece: Piece) -> memoryview:
    if isinstance(piece, memoryview):
        return piece
    return memoryview(piece.reshape(-1).view(torch.uint8).numpy())
