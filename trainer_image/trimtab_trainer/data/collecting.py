"""All parts of a data set as two files of standard rows, checked, sampled and split, with one digest.

Memory is bounded: rows go from file to file; only their positions are held.
"""

from __future__ import annotations

import array
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import DataPart, Dataset
from trimtab_trainer.data import media
from trimtab_trainer.data.reading import Skipped, Spoiled, broken, read, strictly
from trimtab_trainer.data.rows import Format, Kind, Row, detect, shown, standard
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalData

T = TypeVar("T")

ALL = "all.jsonl"
"""File of all rows, those that are set aside included."""

Complete = Callable[[Mapping[str, Any], Row, str, int], Row]
"""From the raw columns and the standard row (with source and row number, for messages) to the method's row."""

Reshape = Callable[[Mapping[str, Any], bool, str, int], Mapping[str, Any]]
"""From raw columns (whether plain text is asked for, source and row number) to columns that a format reads."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of rows."""

    answer: bool
    """A conversation must end with the assistant's answer."""
    text_allowed: bool
    """Plain text will do."""
    reshape: Reshape | None = None
    """Rewrites a method's own way of giving a conversation, before the format is read. None: nothing."""
    shown: tuple[Kind, ...] = ()
    """What it looks at beside text."""
    boxes: bool = False
    """Whether it learns from boxes on images."""
    complete: Complete | None = None
    """What else a row must have: adds the method's own columns to a standard row. None: nothing."""


@dataclass(frozen=True)
class Collected:
    """Standard rows on disk."""

    train: Path
    validation: Path | None
    rows: int
    """Training rows."""
    validation_rows: int
    digest: str
    """Identity of the rows: over their standard form, the sampling and the split."""
    conversations: bool
    """Whether some rows are conversations, which need a chat template."""
    shown: frozenset[Kind] = frozenset()
    """What some rows show beside text."""
    roots: tuple[media.Root, ...] = ()
    """Where the names of that begin."""
    skipped: int = 0
    """Broken rows that were passed over, because the spec is not strict."""
    first_skipped: str | None = None
    """What was wrong with the first of them."""

    @property
    def remark(self) -> str:
        """What is to be said of rows that were passed over, after a sentence about those that were not."""
        if not self.skipped:
            return ""
        return f"; {self.skipped} broken rows were passed over, the first: {(self.first_skipped or '')[:400]}"


class PartReader:
    """Makes the raw rows of one part standard ones; its first row tells the format."""

    def __init__(self, part: DataPart, needs: Needs, root: media.Root | None = None):
        self._part = part
        self._needs = needs
        self._root = root
        self._form: Format | None = None if part.format == "auto" else part.format

    def standard(self, raw: dict[str, Any], where: str, number: int) -> Row:
        """The standard row. Raises Fault(DataInvalid) that says what is wrong with it."""
        needs = self._needs
        renamed: Mapping[str, Any] = media.tagged(_renamed(raw, self._part, where, number))
        if needs.reshape is not None:
            renamed = needs.reshape(renamed, self._part.format == "text", where, number)
        self._form = self._form or detect(renamed, where, number, needs.answer)
        if self._form == "text" and not needs.text_allowed:
            raise Fault(
                Reason.DATA_INVALID,
                f"{where} row {number}: plain text has no answers to learn",
                "Use method pretrain, set dataset.loss: all, or give conversations.",
            )
        row = standard(renamed, self._form, needs.answer, where, number, needs.text_allowed)
        row = media.seen(renamed, row, self._root, needs.shown, needs.boxes, where, number)
        return row if needs.complete is None else needs.complete(renamed, row, where, number)


def standard_rows(local: LocalData, needs: Needs, spoiled: Spoiled = strictly) -> Iterator[Row]:
    """Each row of one source in standard form; a broken one goes to `spoiled`."""
    reader = PartReader(local.source.part, needs, media.Root.of(local, local.source.media))
    for path in local.files:
        where = _where(local, path)
        for number, raw in read(path, where, spoiled):
            try:
                row = reader.standard(raw, where, number)
            except Fault as fault:
                spoiled(fault)
            else:
                yield row


def collect(
    train: list[LocalData], validation: list[LocalData], dataset: Dataset, needs: Needs, into: Path
) -> Collected:
    """Check, sample and split all rows.

    Raises Fault(DataInvalid) for a broken row and Fault(DataEmpty) when no training row is left.
    """
    into.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    skipped = Skipped()
    spoiled = strictly if dataset.strict else skipped
    rows = _mixed(train, dataset, needs, into, spoiled)
    everything = Lines.write(into / ALL, rows, digest)
    if train and not len(everything):
        names = ", ".join(f"{local.source.field} {local.display}" for local in train)
        broken_ones = f"no sound row, {skipped.rows} broken ones; {skipped.first}" if skipped.rows else "no row"
        raise Fault(Reason.DATA_EMPTY, f"{names}: {broken_ones}", "Add rows.")
    held_out, validation_path, conversations = 0, None, everything.conversations
    kinds = set(everything.shown)
    if dataset.validation_split:
        held_out = max(1, round(len(everything) * dataset.validation_split))
        if held_out >= len(everything):
            raise Fault(Reason.DATA_EMPTY, f"dataset.validationSplit leaves no row of {len(everything)} to train on")
        order = list(range(len(everything)))
        random.Random(dataset.seed).shuffle(order)  # noqa: S311 - a draw that must come again
        validation_path = everything.copy(into / "validation.jsonl", sorted(order[:held_out]))
        train_path = everything.copy(into / "train.jsonl", sorted(order[held_out:]))
        digest.update(f"split {dataset.validation_split} {dataset.seed}".encode())
    else:
        train_path = everything.path
    if validation:
        held = sampled(validation, dataset.seed, needs, into, spoiled)
        lines = Lines.write(into / "validation.jsonl", held, digest)
        held_out, validation_path = len(lines), lines.path
        conversations = conversations or lines.conversations
        kinds |= lines.shown
    return Collected(
        train=train_path,
        validation=validation_path,
        rows=len(everything) - (held_out if dataset.validation_split else 0),
        validation_rows=held_out,
        digest="sha256:" + digest.hexdigest(),
        conversations=conversations,
        skipped=skipped.rows,
        first_skipped=skipped.first,
        shown=frozenset(kinds),
        roots=tuple(media.Root.of(local, local.source.media) for local in (*train, *validation)),
    )


def rows_of(path: Path) -> Iterator[Row]:
    """The standard rows of a collected file."""
    with path.open("rb") as stream:
        for line in stream:
            yield json.loads(line)


class Lines:
    """A file of rows whose positions are known."""

    def __init__(self, path: Path):
        self.path = path
        self.conversations = False
        """Whether some rows are conversations."""
        self.shown: set[Kind] = set()
        """What some rows show."""
        self._starts = array.array("Q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @classmethod
    def write(cls, path: Path, rows: Iterable[Row], digest: Any = None) -> Lines:
        """Write rows, and take each into a digest."""
        lines = cls(path)
        with path.open("wb") as stream:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"
                lines.conversations = lines.conversations or "messages" in row
                lines.shown.update(kind for kind, _ in shown(row))
                stream.write(line)
                lines._starts.append(lines._starts[-1] + len(line))
                if digest is not None:
                    digest.update(line)
        return lines

    def pick(self, indexes: Iterable[int]) -> Iterator[bytes]:
        """The lines at some positions."""
        with self.path.open("rb") as stream:
            for index in indexes:
                stream.seek(self._starts[index])
                yield stream.read(self._starts[index + 1] - self._starts[index])

    def copy(self, path: Path, indexes: Iterable[int]) -> Path:
        """Write the lines at some positions into another file."""
        with path.open("wb") as stream:
            stream.writelines(self.pick(indexes))
        return path


def _mixed(parts: list[LocalData], dataset: Dataset, needs: Needs, into: Path, spoiled: Spoiled) -> Iterator[Row]:
    """The rows of all parts one after the other, or drawn from them in turns where the spec asks for it."""
    if dataset.interleave is None:
        yield from sampled(parts, dataset.seed, needs, into, spoiled)
        return
    written = [
        Lines.write(into / f"turn-{number}.jsonl", _drawn(local, dataset.seed + number, needs, into, spoiled))
        for number, local in enumerate(parts)
    ]
    yield from in_turns([partial(rows_of, lines.path) for lines in written], dataset)
    for lines in written:
        lines.path.unlink()


def in_turns(parts: Sequence[Callable[[], Iterator[T]]], dataset: Dataset) -> Iterator[T]:
    """Items drawn from several parts, by weight, in an order that the data seed decides.

    Ends when a part is drawn that has no more, or, with allExhausted, when each has had its end; those that end
    earlier begin anew meanwhile. Raises Fault(DataEmpty) for a part that cannot.
    """
    assert dataset.interleave is not None
    weights = dataset.interleave.weights or [1.0] * len(parts)
    draw = random.Random(dataset.seed)  # noqa: S311 - a draw that must come again
    running = [part() for part in parts]
    ended: set[int] = set()
    while True:
        [number] = draw.choices(range(len(parts)), weights)
        try:
            item = next(running[number])
        except StopIteration:
            ended.add(number)
            if dataset.interleave.stopping == "firstExhausted" or len(ended) == len(parts):
                return
            running[number] = parts[number]()
            try:
                item = next(running[number])
            except StopIteration:
                problem = f"dataset.train[{number}]: no row to mix in"
                raise Fault(Reason.DATA_EMPTY, problem, "Add rows.") from None
        yield item


def sampled(parts: list[LocalData], seed: int, needs: Needs, into: Path, spoiled: Spoiled) -> Iterator[Row]:
    """The rows of all parts, one part after the other, each as its sample says."""
    for number, local in enumerate(parts):
        yield from _drawn(local, seed + number, needs, into, spoiled)


def _drawn(local: LocalData, seed: int, needs: Needs, into: Path, spoiled: Spoiled) -> Iterator[Row]:
    rows = standard_rows(local, needs, spoiled)
    wanted = local.source.part.sample
    if wanted is None:
        yield from rows
        return
    lines = Lines.write(into / "part.jsonl", rows)
    if not len(lines):
        raise Fault(Reason.DATA_EMPTY, f"{local.source.field} {local.display}: no row to sample from", "Add rows.")
    for line in lines.pick(sample(len(lines), wanted, seed)):
        yield json.loads(line)
    lines.path.unlink()


def sample(available: int, wanted: int, seed: int) -> list[int]:
    """Positions of `wanted` rows: each row as often as another, give or take one; which ones, the seed decides."""
    whole, rest = divmod(wanted, available)
    drawn = random.Random(seed).sample(range(available), rest)  # noqa: S311 - a draw that must come again
    return [*list(range(available)) * whole, *sorted(drawn)]


def _renamed(raw: dict[str, Any], part: DataPart, where: str, row: int) -> dict[str, Any]:
    if not part.columns:
        return raw
    missing = [name for name in part.columns if name not in raw]
    if missing and not any(name in raw for name in part.columns):
        raise broken(
            where, row, f"column {missing[0]!r} of dataset.columns is not there", "Correct columns, or the row."
        )
    return {part.columns.get(name, name): value for name, value in raw.items()}


def _where(local: LocalData, path: Path) -> str:
    name = local.display if len(local.files) == 1 else f"{local.display.rstrip('/')}/{path.name}"
    return f"{local.source.field} {name}"
