"""Short sequences side by side in one: no padding is computed, and each document stays to itself.

A pack keeps the length of each document in it. Whoever makes a batch of packs restarts positions at each, which is what
attention needs to tell documents apart, and no document's first token is learnt: nothing comes before it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy
import numpy.typing
import pyarrow
import pyarrow.compute

from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data.sequences import IGNORED, WEIGHTS

LENGTHS = "lengths"
"""Column of a pack: tokens of each document in it, in order."""
WRITTEN = 256
"""Packs that are written at once."""

Numbers: TypeAlias = numpy.typing.NDArray[Any]


class Piece(NamedTuple):
    """A part of a sequence: nearly always all of it."""

    sequence: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Packed:
    """What became of the sequences."""

    packs: int
    filled: float
    """Share of the packs' room that holds tokens."""


def settings(dataset: Dataset) -> str:
    """What decides how the same sequences are packed, as text: part of their identity."""
    assert dataset.packing is not None
    return f"packing {dataset.packing.strategy} {dataset.packing.length or dataset.max_length}"


def pack(sequences: Path, dataset: Dataset, into: Path) -> Packed:
    """Pack an Arrow file of sequences into another; the same sequences give the same packs.

    Memory holds two numbers for each sequence; the tokens stay on disk.
    """
    assert dataset.packing is not None
    room = dataset.packing.length or dataset.max_length
    with pyarrow.memory_map(str(sequences)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        sizes = [int(size) for size in pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()]
        if dataset.packing.strategy == "wrapped":
            packs = wrapped(sizes, room)
        else:
            packs = best_fit_decreasing(list(_cut(sizes, room)), room)
        count = _write(table, packs, into)
    return Packed(count, sum(sizes) / max(count * room, 1))


def _cut(sizes: Iterable[int], room: int) -> Iterator[Piece]:
    for sequence, size in enumerate(sizes):
        for start in range(0, size, room):
            yield Piece(sequence, start, min(size, start + room))


def wrapped(sizes: Sequence[int], room: int) -> list[list[Piece]]:
    """All sequences one after the other, cut wherever a pack is full."""
    packs: list[list[Piece]] = [[]]
    left = room
    for sequence, size in enumerate(sizes):
        start = 0
        while start < size:
            if not left:
                packs.append([])
                left = room
            end = min(size, start + left)
            packs[-1].append(Piece(sequence, start, end))
            left -= end - start
            start = end
    return [each for each in packs if each]


def best_fit_decreasing(pieces: Sequence[Piece], room: int) -> list[list[Piece]]:
    """Longest first, each into the fullest pack that still takes it (arXiv:2404.10830)."""
    packs: list[list[Piece]] = []
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for piece in sorted(pieces, key=lambda each: -each.length):
        at = bisect.bisect_left(spaces, piece.length)
        if at == len(spaces):
            packs.append([])
            number, space = len(packs) - 1, room
        else:
            space = spaces[at]
            number = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(at)
        packs[number].append(piece)
        left = space - piece.length
        if left:
            if not by_space.setdefault(left, []):
                bisect.insort(spaces, left)
            by_space[left].append(number)
    return packs


class _Column:
    """A column of lists in memory-mapped chunks, read piece by piece."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._first = numpy.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def of(self, piece: Piece) -> Numbers:
        """The numbers of a piece; fewer when the list is shorter."""
        chunk = int(numpy.searchsorted(self._first, piece.sequence, side="right")) - 1
        offsets = self._offsets[chunk]
        begin, end = offsets[piece.sequence - self._first[chunk]], offsets[piece.sequence - self._first[chunk] + 1]
        found: Numbers = self._values[chunk][begin:end][piece.start : piece.end]
        return found


def _write(table: pyarrow.Table, packs: list[list[Piece]], into: Path) -> int:
    fields = [*table.schema, pyarrow.field(LENGTHS, pyarrow.list_(pyarrow.int32()))]
    schema = pyarrow.schema(fields)
    columns = {name: _Column(table[name]) for name in table.column_names}
    weighted = WEIGHTS in columns and bool(
        pyarrow.compute.any(pyarrow.compute.greater(pyarrow.compute.list_value_length(table[WEIGHTS]), 0)).as_py()
    )
    with pyarrow.OSFile(str(into), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(packs), WRITTEN):
            batch = [_pack(columns, each, weighted) for each in packs[start : start + WRITTEN]]
            arrays = [pyarrow.array([each[field.name] for each in batch], type=field.type) for field in fields]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
    return len(packs)


def _pack(columns: dict[str, _Column], pieces: list[Piece], weighted: bool) -> dict[str, Any]:
    whole: dict[str, Any] = {LENGTHS: [piece.length for piece in pieces]}
    for name, column in columns.items():
        if name == WEIGHTS and not weighted:
            whole[name] = []
            continue
        parts = [column.of(piece) for piece in pieces]
        if name == WEIGHTS:
            parts = [part if len(part) else numpy.ones(piece.length) for part, piece in zip(parts, pieces, strict=True)]
        whole[name] = numpy.concatenate(parts)
    starts = numpy.cumsum([0, *whole[LENGTHS][:-1]])
    whole["labels"][starts] = IGNORED
    return whole
