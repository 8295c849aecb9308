"""A model's tensors in the files of a folder, read in order and ahead, and held against the manifest on the way."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge import memory
from trimtab_trainer.merge.places import Folder, read_small, wrong_content
from trimtab_trainer.merge.tensorfile import PREFIX, TensorInfo, header_length, parse_header

CHUNK = 4 << 20
"""Bytes of one request."""
_AHEAD = 3
"""Requests under way before their bytes are wanted."""
_KEPT = 1
"""Chunks of a file that are kept, so that tensors which are wanted together may stand a little apart."""
_UNHASHED = 8
"""Chunks that wait for an earlier one to be hashed; what comes beyond is read again at the end."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a folder in the transformers layout, by their names on disk."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        """In the order of files and bytes."""
        self._pool = ThreadPoolExecutor(_AHEAD + 1, thread_name_prefix="read")
        self._files: dict[str, ChunkedFile] = {}
        self._latest = ""
        """The file that was read last; it and the one before keep their chunks."""
        self._sound: set[str] = set()
        """Files whose content was held against the manifest: they are not hashed again."""
        for name in self._weight_files():
            for tensor in self._header(name):
                self.tensors[tensor.name] = tensor

    def read(self, tensor: TensorInfo) -> torch.Tensor:
        """A whole tensor. It may share memory with others: do not write into it."""
        return self.rows(tensor, 0, tensor.shape[0] if tensor.shape else 0)

    def rows(self, tensor: TensorInfo, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of the first dimension. They may share memory with others: do not write into them."""
        if not tensor.shape:
            return as_tensor(b"".join(self.pieces(tensor)), tensor.dtype, ())
        stride = tensor.size // max(1, tensor.shape[0])
        start = tensor.start + first * stride
        pieces = list(self._file(tensor.file).read(start, (last - first) * stride))
        alone = len(pieces) == 1 and start % tensor.dtype.itemsize == 0
        return as_tensor(pieces[0] if alone else joined(pieces), tensor.dtype, (last - first, *tensor.shape[1:]))

    def pieces(self, tensor: TensorInfo) -> Iterator[memoryview]:
        """A tensor's bytes as they come."""
        return self._file(tensor.file).read(tensor.start, tensor.size)

    def finish(self, file: str) -> None:
        """No more of this file is wanted: see that it was what the manifest says.

        Raises Fault(DigestMismatch); what was never read is read for it.
        """
        self._file(file).finish()
        self._files.pop(file)
        self._sound.add(file)

    def rest(self) -> None:
        """Let go of what was read ahead or is kept, because nothing is wanted for a while."""
        for file in self._files.values():
            file.rest()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _file(self, name: str) -> ChunkedFile:
        if name != self._latest:
            for other in set(self._files) - {name, self._latest}:
                self._files[other].rest()
            self._latest = name
        if name not in self._files:
            wanted = None if name in self._sound else self.folder.sha256.get(name)
            self._files[name] = ChunkedFile(self.folder, name, self._pool, wanted)
        return self._files[name]

    def _weight_files(self) -> list[str]:
        sizes = self.folder.sizes
        if INDEX in sizes:
            index: dict[str, Any] = json.loads(read_small(self.folder, INDEX))
            files = sorted(set(index["weight_map"].values()))
        elif SINGLE in sizes:
            files = [SINGLE]
        else:
            hint = "Point to a folder in the transformers layout."
            raise Fault(Reason.MODEL_INVALID, f"{self.folder.uri} holds neither {SINGLE} nor {INDEX}", hint)
        missing = [file for file in files if file not in sizes]
        if missing:
            raise Fault(Reason.MODEL_INVALID, f"{self.folder.uri}/{INDEX} names {missing[0]}, which is not there")
        return files

    def _header(self, name: str) -> list[TensorInfo]:
        size = self.folder.sizes[name]
        prefix = bytearray(min(PREFIX, size))
        self.folder.read_into(name, 0, memoryview(prefix))
        header = bytearray(header_length(bytes(prefix), name, size))
        self.folder.read_into(name, PREFIX, memoryview(header))
        return parse_header(bytes(header), name, size)


class ChunkedFile:
    """One file, read in chunks, ahead of what is asked for, hashed in order when its digest is known."""

    def __init__(self, folder: Folder, name: str, pool: ThreadPoolExecutor, wanted: str | None):
        self._folder = folder
        self._name = name
        self._size = folder.sizes[name]
        self._count = -(-self._size // CHUNK)
        self._pool = pool
        self._chunks: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._wanted = wanted
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._waiting: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> Iterator[memoryview]:
        """The bytes from `start` on, in as many pieces as chunks hold them."""
        end = start + length
        while start < end:
            index, offset = divmod(start, CHUNK)
            piece = self._chunk(index)[offset : offset + end - start]
            start += len(piece)
            yield piece

    def rest(self) -> None:
        """Let go of the chunks that are kept."""
        self._chunks.clear()

    def finish(self) -> None:
        """Hash what was not yet hashed and compare. Raises Fault(DigestMismatch)."""
        self._chunks.clear()
        if self._wanted is None:
            return
        while self._hashed < self._count:
            self._fetch(self._hashed)
        if self._sha256.hexdigest() != self._wanted:
            raise wrong_content(self._folder, self._name)

    def _chunk(self, index: int) -> memoryview:
        for ahead in range(index, min(index + 1 + _AHEAD, self._count)):
            if ahead not in self._chunks:
                self._chunks[ahead] = self._pool.submit(self._fetch, ahead)
        self._chunks.move_to_end(index)
        while len(self._chunks) > _KEPT + _AHEAD:
            self._chunks.popitem(last=False)
        return self._chunks[index].result()

    def _fetch(self, index: int) -> memoryview:
        content = memory.take(min(CHUNK, self._size - index * CHUNK))
        self._folder.read_into(self._name, index * CHUNK, content)
        if self._wanted is not None:
            self._hash(index, content)
        return content

    def _hash(self, index: int, content: memoryview) -> None:
        # Chunks arrive in any order and from several threads; the digest wants them in one.
        with self._lock:
            if index == self._hashed or (index > self._hashed and len(self._waiting) < _UNHASHED):
                self._waiting[index] = content
            while self._hashed in self._waiting:
                self._sha256.update(self._waiting.pop(self._hashed))
                self._hashed += 1


def joined(pieces: Sequence[memoryview]) -> memoryview:
    """The bytes of the pieces in one."""
    whole = memory.take(sum(len(piece) for piece in pieces))
    start = 0
    for piece in pieces:
        whole[start : start + len(piece)] = piece
        start += len(piece)
    return whole


def as_tensor(content: bytes | bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that these bytes are."""
    if len(content) == 0:
        return torch.empty(shape, dtype=dtype)
    writable = bytearray(content) if isinstance(content, bytes) else content
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
