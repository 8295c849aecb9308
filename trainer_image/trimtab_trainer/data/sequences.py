"""Rows become sequences of token ids with labels, in an Arrow file that is mapped into memory, not held in it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import rows_of
from trimtab_trainer.data.masks import Loss, Render, learnt, render_row
from trimtab_trainer.data.rows import Row
from trimtab_trainer.endings import Fault

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not learnt."""
BATCH = 256
"""Rows that are tokenised at once."""
CHECKED_ROWS = 64
"""Rows whose prompt is tokenised again by itself."""

Truncation = Literal["delete", "left", "right", "split"]


@dataclass(frozen=True)
class Shaping:
    """How rows become sequences."""

    loss: Loss
    truncation: Truncation
    max_length: int
    ends_document: bool
    """Append the end-of-text token, as pretraining separates documents."""

    @classmethod
    def of(cls, config: RunConfig, ends_document: bool) -> Shaping:
        """As the spec asks."""
        resolved = config.resolved
        return cls(resolved.loss, resolved.truncation, config.spec.dataset.max_length, ends_document)


@dataclass
class Count:
    """What became of the rows."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    learnt: int = 0
    deleted: int = 0
    cut: int = 0
    checked: int = 0
    torn: int = 0
    """Checked rows whose prompt, tokenised alone, differs from the beginning of the whole."""
    digest: str = field(default="", repr=False)
    """Over all sequences: every pod must have the same."""


class Encoder(Protocol):
    """How a method's rows become records of token ids."""

    columns: tuple[str, ...]
    """Columns of a record, each a list of whole numbers."""

    def encode(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """The records of some rows."""
        ...

    def conclude(self) -> Count:
        """What became of all rows.

        Raises Fault(DataEmpty) when nothing is left, Fault(DataInvalid) when nothing of it would be learnt.
        """
        ...


def write(rows: Path, encoder: Encoder, into: Path) -> Count:
    """Encode a collected file into the Arrow file `into`; returns what became of the rows.

    Raises what the encoder raises.
    """
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in encoder.columns])
    digest = hashlib.sha256()
    with pyarrow.OSFile(str(into), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(rows_of(rows), BATCH):
            table: dict[str, list[list[int]]] = {name: [] for name in encoder.columns}
            for record in encoder.encode(batch):
                digest.update(repr([record[name] for name in encoder.columns]).encode())
                for name in encoder.columns:
                    table[name].append(record[name])
            if table[encoder.columns[0]]:
                writer.write_batch(pyarrow.RecordBatch.from_pydict(table, schema=schema))
    count = encoder.conclude()
    count.digest = digest.hexdigest()
    return count


class Language:
    """Text and conversations as input_ids with labels."""

    columns: tuple[str, ...] = ("input_ids", "labels")

    def __init__(self, tokenizer: Any, render: Render | None, shaping: Shaping):
        self._tokenizer = tokenizer
        self._render = render
        self._shaping = shaping
        self._count = Count()

    def encode(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """See Encoder."""
        for ids, labels in _sequences(rows, self._tokenizer, self._render, self._shaping, self._count):
            yield {"input_ids": ids, "labels": labels}

    def conclude(self) -> Count:
        """See Encoder."""
        _judge(self._count, self._shaping)
        return self._count


def _judge(count: Count, shaping: Shaping) -> None:
    if not count.sequences:
        raise Fault(
            Reason.DATA_EMPTY,
            f"all {count.rows} rows are longer than dataset.maxLength {shaping.max_length} and were deleted",
            "Raise dataset.maxLength, or set dataset.truncation to left or right.",
        )
    if not count.learnt:
        raise Fault(
            Reason.DATA_INVALID,
            f"none of {count.tokens} tokens would be learnt: every answer was cut off or is empty",
            "Raise dataset.maxLength, or set dataset.truncation to left.",
        )
    if count.deleted or count.cut:
        log.warning("of %d rows, %d were too long and deleted, %d were cut", count.rows, count.deleted, count.cut)
    if count.torn:
        log.warning(
            "in %d of %d checked rows a token reaches from the prompt into the answer; it is not learnt",
            count.torn,
            count.checked,
        )


def _sequences(
    rows: list[Row], tokenizer: Any, render: Render | None, shaping: Shaping, count: Count
) -> Iterator[tuple[list[int], list[int]]]:
    rendered = [render_row(row, render, shaping.loss) for row in rows]
    texts = [text for text, _ in rendered]
    plain = ["text" in row for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    for index, (text, spans) in enumerate(rendered):
        ids, offsets = list(encoded["input_ids"][index]), encoded["offset_mapping"][index]
        marks = learnt(offsets, spans)
        count.rows += 1
        if shaping.loss != "all" and count.checked < CHECKED_ROWS:
            _check_prompt(text, spans, ids, offsets, tokenizer, count)
        if plain[index] and tokenizer.bos_token_id is not None and _adds_bos(tokenizer):
            ids, marks = [tokenizer.bos_token_id, *ids], [False, *marks]
        if shaping.ends_document and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids, marks = [*ids, tokenizer.eos_token_id], [*marks, True]
        labels = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
        for piece in _fit(ids, labels, shaping, count):
            count.sequences += 1
            count.tokens += len(piece[0])
            count.learnt += sum(label != IGNORED for label in piece[1][1:])
            yield piece


def _check_prompt(
    text: str, spans: list[Any], ids: list[int], offsets: list[Any], tokenizer: Any, count: Count
) -> None:
    """A server tokenises the prompt alone: it must get the tokens that the answer was learnt after."""
    count.checked += 1
    for start, _ in spans:
        alone = tokenizer(text[:start], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = [token for token, (begin, _) in zip(ids, offsets, strict=True) if begin < start]
        if list(alone) != whole:
            count.torn += 1
            return


def _fit(ids: list[int], labels: list[int], shaping: Shaping, count: Count) -> Iterator[tuple[list[int], list[int]]]:
    limit = shaping.max_length
    if len(ids) <= limit:
        yield ids, labels
    elif shaping.truncation == "delete":
        count.deleted += 1
    elif shaping.truncation == "split":
        count.cut += 1
        for start in range(0, len(ids), limit):
            if len(ids) - start > 1:
                yield ids[start : start + limit], labels[start : start + limit]
    else:
        count.cut += 1
        kept = slice(-limit, None) if shaping.truncation == "left" else slice(limit)
        yield ids[kept], labels[kept]


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with its own mark; templates write it themselves."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
