"""Rows become sequences of token ids with labels, in an Arrow file that is mapped into memory, not held in it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import rows_of
from trimtab_trainer.data.masks import Learning, Loss, Part, Render, render_parts, weights
from trimtab_trainer.data.reading import Spoiled, strictly
from trimtab_trainer.data.rows import Row, shows
from trimtab_trainer.endings import Fault

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not learnt."""
BATCH = 256
"""Rows that are tokenised at once."""
CHECKED_ROWS = 64
"""Rows whose prompt is tokenised again by itself."""
TOKENS = "tokens"
"""Key of a batch: tokens in it, padding left out."""

WEIGHTS = "weights"
"""Column with each token's weight in the loss; empty where every learnt token counts once."""
TARGETS = "targets"
"""Column with the numbers that a whole record is learnt to have."""

Truncation = Literal["delete", "left", "right", "split"]


@dataclass(frozen=True)
class Shaping:
    """How rows become sequences."""

    loss: Loss
    truncation: Truncation
    max_length: int
    ends_document: bool
    """Append the end-of-text token, as pretraining separates documents."""
    ends_text: bool = False
    """Append it to rows of plain text, whose end nothing else tells."""
    tool_call_weight: float = 1.0
    """Weight of tool calls within answers."""
    ignore_empty_think: bool = False
    """Leave out the empty thoughts that an answer begins with."""

    @classmethod
    def of(cls, config: RunConfig, ends_document: bool, ends_text: bool = False) -> Shaping:
        """As the spec asks."""
        resolved, dataset = config.resolved, config.spec.dataset
        return cls(
            resolved.loss,
            resolved.truncation,
            dataset.max_length,
            ends_document,
            ends_text,
            dataset.tool_call_weight,
            dataset.ignore_empty_think,
        )

    def of_row(self, row: Row) -> Shaping:
        """For one row: what shows images is kept whole or deleted; cut, it would show half an image."""
        return replace(self, truncation="delete") if shows(row) else self

    @property
    def learning(self) -> Learning:
        """What is learnt of conversations."""
        return Learning(self.loss, self.tool_call_weight, self.ignore_empty_think)


@dataclass
class Count:
    """What became of the rows."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    learnt: int = 0
    deleted: int = 0
    cut: int = 0
    longest: int = 0
    """Tokens of the longest row, before it is cut."""
    checked: int = 0
    torn: int = 0
    """Checked rows whose prompt, tokenised alone, differs from the beginning of the whole."""
    digest: str = field(default="", repr=False)
    """Over all sequences: every pod must have the same."""

    def keep(self, counts: Sequence[float]) -> None:
        """Count a sequence that stays, by its tokens' weights. The first is never learnt: nothing predicts it."""
        self.sequences += 1
        self.tokens += len(counts)
        self.learnt += sum(each > 0 for each in counts[1:])


class Encoder(Protocol):
    """How a method's rows become records of token ids."""

    columns: tuple[str, ...]
    """Columns of a record, each a list of numbers: real ones in WEIGHTS and TARGETS, whole ones in all others."""

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """The records of some rows."""
        ...

    def conclude(self) -> Count:
        """What became of all rows.

        Raises Fault(DataEmpty) when nothing is left, Fault(DataInvalid) when nothing of it would be learnt.
        """
        ...


def write(rows: Path, encoder: Encoder, into: Path, spoiled: Spoiled = strictly) -> Count:
    """Encode a collected file into the Arrow file `into`; returns what became of the rows.

    A row that the template refuses goes to `spoiled`. Raises what else the encoder raises.
    """
    import pyarrow

    kinds = {WEIGHTS: pyarrow.float32(), TARGETS: pyarrow.float32()}
    schema = pyarrow.schema([(name, pyarrow.list_(kinds.get(name, pyarrow.int32()))) for name in encoder.columns])
    digest = hashlib.sha256()
    with pyarrow.OSFile(str(into), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(rows_of(rows), BATCH):
            table: dict[str, list[Sequence[float]]] = {name: [] for name in encoder.columns}
            for record in _records(encoder, batch, spoiled):
                told = [record[name] for name in encoder.columns if name != WEIGHTS or record[name]]
                digest.update(repr(told).encode())
                for name in encoder.columns:
                    table[name].append(record[name])
            if table[encoder.columns[0]]:
                writer.write_batch(pyarrow.RecordBatch.from_pydict(table, schema=schema))
    count = encoder.conclude()
    count.digest = digest.hexdigest()
    return count


def _records(encoder: Encoder, batch: list[Row], spoiled: Spoiled) -> Iterable[Mapping[str, Sequence[float]]]:
    """The records of a batch; row by row when one of them is broken and that shall not end everything."""
    if spoiled is strictly:
        return encoder.encode(batch)
    try:
        return list(encoder.encode(batch))
    except Fault as fault:
        if fault.reason is not Reason.DATA_INVALID:
            raise
    found: list[Mapping[str, Sequence[float]]] = []
    for row in batch:
        try:
            found += encoder.encode([row])
        except Fault as fault:
            spoiled(fault)
    return found


class Language:
    """Text and conversations as input_ids with labels."""

    columns: tuple[str, ...] = ("input_ids", "labels", WEIGHTS)

    def __init__(self, tokenizer: Any, render: Render | None, shaping: Shaping):
        self.tokenizer = tokenizer
        self.render = render
        self.shaping = shaping
        self._count = Count()

    def encode(self, rows: list[Row]) -> Iterator[dict[str, Sequence[float]]]:
        """See Encoder."""
        sequences = weighed(rows, self.tokenizer, self.render, self.shaping, self._count)
        for row, sequence in zip(rows, sequences, strict=True):
            self._count.rows += 1
            for ids, counts in fit(*sequence, self.shaping.of_row(row), self._count):
                self._count.keep(counts)
                yield {
                    "input_ids": ids,
                    "labels": labels(ids, counts),
                    WEIGHTS: counts if any(count not in (0, 1) for count in counts) else [],
                }

    def conclude(self) -> Count:
        """See Encoder."""
        judge(self._count, self.shaping)
        return self._count


def labels(ids: Sequence[int], counts: Sequence[float]) -> list[int]:
    """The tokens that are learnt; IGNORED stands for the others."""
    return [token if count else IGNORED for token, count in zip(ids, counts, strict=True)]


def judge(count: Count, shaping: Shaping) -> None:
    """Say what became of the rows.

    Raises Fault(DataEmpty) when nothing is left, Fault(DataInvalid) when nothing of it would be learnt.
    """
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


def weighed(
    rows: list[Row], tokenizer: Any, render: Render | None, shaping: Shaping, count: Count
) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids of each row, of whatever length, with the weights of their losses."""
    rendered = [render_parts(row, render, shaping.learning) for row in rows]
    texts = [text for text, _ in rendered]
    plain = ["text" in row for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    for index, (text, parts) in enumerate(rendered):
        ids, offsets = list(encoded["input_ids"][index]), encoded["offset_mapping"][index]
        counts = weights(offsets, parts)
        if shaping.loss != "all" and count.checked < CHECKED_ROWS:
            _check_prompt(text, parts, ids, offsets, tokenizer, count)
        if plain[index] and tokenizer.bos_token_id is not None and _adds_bos(tokenizer):
            ids, counts = [tokenizer.bos_token_id, *ids], [0.0, *counts]
        ends = shaping.ends_document or (shaping.ends_text and plain[index])
        if ends and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids, counts = [*ids, tokenizer.eos_token_id], [*counts, 1.0]
        count.longest = max(count.longest, len(ids))
        yield ids, counts


def _check_prompt(
    text: str, parts: list[Part], ids: list[int], offsets: list[Any], tokenizer: Any, count: Count
) -> None:
    """A server tokenises the prompt alone: it must get the tokens that the answer was learnt after."""
    count.checked += 1
    for start in {part.start for part in parts} - {part.end for part in parts}:
        alone = tokenizer(text[:start], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        whole = [token for token, (begin, _) in zip(ids, offsets, strict=True) if begin < start]
        if list(alone) != whole:
            count.torn += 1
            return


def fit(ids: list[int], counts: list[float], shaping: Shaping, count: Count) -> Iterator[tuple[list[int], list[float]]]:
    """A sequence as it is when it is short enough, else what truncation leaves of it."""
    limit = shaping.max_length
    if len(ids) <= limit:
        yield ids, counts
    elif shaping.truncation == "delete":
        count.deleted += 1
    elif shaping.truncation == "split":
        count.cut += 1
        for start in range(0, len(ids), limit):
            if len(ids) - start > 1:
                yield ids[start : start + limit], counts[start : start + limit]
    else:
        count.cut += 1
        kept = slice(-limit, None) if shaping.truncation == "left" else slice(limit)
        yield ids[kept], counts[kept]


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
