"""Rows that are read, checked and tokenised while the training runs, in bounded memory and with none of them on disk.

Each process takes its own part of the rows and keeps its own place in them: epoch, block, row and record. A block of
rows is shuffled as a whole, by a seed that follows from its place, so that the place alone brings the order back.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data.collecting import Collected, Lines, Needs, PartReader, in_turns, sampled
from trimtab_trainer.data.feeds import FedRow, Feed
from trimtab_trainer.data.reading import Skipped, Spoiled, parse, strictly
from trimtab_trainer.data.rows import Row
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalData

T = TypeVar("T")

Record = dict[str, Any]

LOOKED_AT = 256
"""Rows of each part that are looked at before a stream begins."""


@dataclass(frozen=True)
class Cursor:
    """A process's place in the rows; what lies before it has been learnt."""

    epoch: int = 0
    block: int = 0
    row: int = 0
    """Rows of the block, in its shuffled order, that are done."""
    record: int = 0
    """Records of the next row that are done: a row may be split into several."""

    def dump(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


class _Numbered(NamedTuple):
    """A row that is not read yet, and which part it is of."""

    part: int
    row: FedRow


class Stream:
    """The records of a process, without end: after the last row comes the first again.

    Iterating begins at `start`; `cursor` is the place after the record that was given last.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        dataset: Dataset,
        needs: Needs,
        encoder: Encoder,
        rank: int,
        world: int,
    ):
        assert dataset.streaming is not None
        self._feeds = feeds
        self._dataset = dataset
        self._needs = needs
        self._encoder = encoder
        self._rank = rank
        self._world = world
        self.skipped = Skipped()
        """Broken rows that were passed over, because the spec is not strict."""
        self._spoiled: Spoiled = strictly if dataset.strict else self.skipped
        self._size = max(1, dataset.streaming.shuffle_buffer if dataset.shuffle else 1)
        self.start = Cursor()
        """Where iterating begins."""
        self.cursor = Cursor()
        """The place after the record that was given last."""

    def __iter__(self) -> Iterator[Record]:
        """See the class.

        Raises Fault(DataInvalid) for a broken row, Fault(DataEmpty) when a whole epoch gives nothing, and
        Fault(InputChanged) when a source is not what it was.
        """
        self.cursor = self.start
        while True:
            given = False
            for record in self._epoch(self.cursor):
                given = True
                yield record
            if not given and self.cursor.block == self.cursor.row == self.cursor.record == 0:
                raise self._nothing()
            self.cursor = Cursor(epoch=self.cursor.epoch + 1)

    def _epoch(self, start: Cursor) -> Iterator[Record]:
        """The records from `start` to the end of its epoch."""
        readers = [PartReader(feed.source.part, self._needs) for feed in self._feeds]
        own = itertools.islice(self._rows(readers), self._rank, None, self._world)
        rows = itertools.islice(own, start.block * self._size, None)
        for number in itertools.count(start.block):
            block = list(itertools.islice(rows, self._size))
            if not block:
                return
            if self._dataset.shuffle:
                seed = f"{self._dataset.seed} {start.epoch} {number} {self._rank}"
                random.Random(seed).shuffle(block)  # noqa: S311 - an order that must come again
            first = start.row if number == start.block else 0
            for index in range(first, len(block)):
                done = start.record if (number, index) == (start.block, start.row) else 0
                for count, record in enumerate(self._records(block[index], readers), start=1):
                    if count > done:
                        self.cursor = Cursor(start.epoch, number, index, count)
                        yield record

    def _rows(self, readers: list[PartReader]) -> Iterator[_Numbered]:
        """All rows of an epoch, unread but for each part's first, which tells the format."""
        parts = [partial(self._part, number, readers[number]) for number in range(len(self._feeds))]
        if self._dataset.interleave is None:
            return itertools.chain.from_iterable(part() for part in parts)
        return in_turns(parts, self._dataset)

    def _part(self, number: int, reader: PartReader) -> Iterator[_Numbered]:
        for index, row in enumerate(self._feeds[number].read()):
            if index == 0:
                # What is wrong with it is said when its turn comes.
                _standard(reader, row, lambda _: None)
            yield _Numbered(number, row)

    def _records(self, numbered: _Numbered, readers: list[PartReader]) -> Iterator[Record]:
        row = _standard(readers[numbered.part], numbered.row, self._spoiled)
        if row is None:
            return
        try:
            yield from (dict(record) for record in self._encoder.encode([row]))
        except Fault as fault:
            if fault.reason is not Reason.DATA_INVALID:
                raise
            where, number, _ = numbered.row
            self._spoiled(Fault(fault.reason, f"{where} row {number}: {fault.message}", fault.hint))

    def _nothing(self) -> Fault:
        names = ", ".join(f"{feed.source.field} {feed.display}" for feed in self._feeds)
        problem = f"{names}: a whole pass gave process {self._rank} of {self._world} nothing to learn"
        return Fault(
            Reason.DATA_EMPTY,
            problem,
            "Give at least one row for each process, and raise dataset.maxLength if all are longer.",
        )


def _standard(reader: PartReader, fed: FedRow, spoiled: Spoiled) -> Row | None:
    where, number, content = fed
    try:
        raw = content if isinstance(content, dict) else parse(content, where, number)
        return reader.standard(raw, where, number)
    except Fault as fault:
        spoiled(fault)
        return None


def beginning(
    feeds: Sequence[Feed], validation: list[LocalData], dataset: Dataset, needs: Needs, into: Path
) -> Collected:
    """The first rows of each part, checked, and all validation rows: what there is to know before a stream begins.

    Its digest is that of the sources and of how they are mixed; its rows are the ones that were looked at.
    Raises Fault(DataInvalid) for a broken row and Fault(DataEmpty) when there is none.
    """
    skipped = Skipped()
    spoiled = strictly if dataset.strict else skipped
    digest = hashlib.sha256(dataset.model_dump_json(by_alias=True, exclude={"train", "validation"}).encode())
    for feed in feeds:
        digest.update(f"{feed.digest}\n{feed.source.part.model_dump_json(by_alias=True)}\n".encode())
    lines = Lines.write(into / "beginning.jsonl", _first_rows(feeds, needs, spoiled))
    if not len(lines):
        names = ", ".join(f"{feed.source.field} {feed.display}" for feed in feeds)
        raise Fault(Reason.DATA_EMPTY, f"{names}: no sound row among the first {LOOKED_AT}", "Add rows.")
    held = None
    if validation:
        held = Lines.write(into / "validation.jsonl", sampled(validation, dataset.seed, needs, into, spoiled), digest)
        if held.shown:
            problem = f"validation rows show {', '.join(sorted(held.shown))}, and the rows to learn from are streamed"
            raise Fault(Reason.DATA_INVALID, problem, "Leave dataset.streaming out.")
    return Collected(
        train=lines.path,
        validation=None if held is None else held.path,
        rows=len(lines),
        validation_rows=0 if held is None else len(held),
        digest="sha256:" + digest.hexdigest(),
        conversations=lines.conversations,
    )


def _first_rows(feeds: Sequence[Feed], needs: Needs, spoiled: Spoiled) -> Iterator[Row]:
    for feed in feeds:
        reader = PartReader(feed.source.part, needs)
        for fed in itertools.islice(feed.read(), LOOKED_AT):
            row = _standard(reader, fed, spoiled)
            if row is not None:
                yield row


class Loader:
    """Batches of a stream, for a trainer that counts steps."""

    def __init__(self, stream: Stream, collate: Callable[[list[Record]], Any], size: int):
        self._stream = stream
        self._collate = collate
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        """Batches without end."""
        records = iter(self._stream)
        while True:
            yield self._collate(list(itertools.islice(records, self._size)))
