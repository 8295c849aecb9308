"""Rows that are judged as a whole: token ids without a label for each token, and numbers for all of them together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.data.masks import Render, render_row
from trimtab_trainer.data.rows import Row, shows
from trimtab_trainer.data.sequences import Count, Truncation
from trimtab_trainer.endings import Fault

log = logging.getLogger(__name__)


@dataclass
class Tokeniser:
    """Texts and conversations as token ids, cut as the spec asks, and counted."""

    tokenizer: Any
    render: Render | None
    truncation: Truncation
    max_length: int
    count: Count = field(default_factory=Count)

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any, render: Render | None) -> Tokeniser:
        """As the spec asks."""
        return cls(tokenizer, render, config.resolved.truncation, config.spec.dataset.max_length)

    def rows(self, rows: list[Row]) -> list[list[int]]:
        """The ids of each row, of whatever length.

        Plain text gets the tokenizer's own marks, as whoever uses the model will give it; templates write theirs.
        """
        texts = [render_row(row, self.render, "all")[0] for row in rows]
        ids: list[list[int]] = [[] for _ in rows]
        for plain in (True, False):
            picked = [index for index, row in enumerate(rows) if ("text" in row) is plain]
            if picked:
                chosen = [texts[index] for index in picked]
                found = self.tokenizer(chosen, add_special_tokens=plain, return_attention_mask=False)["input_ids"]
                for index, each in zip(picked, found, strict=True):
                    ids[index] = list(each)
        return ids

    def texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of plain texts; one that is too long is cut at its end, before the tokenizer's closing marks."""
        cut = {"truncation": True, "max_length": self.max_length} if self.truncation == "right" else {}
        found = self.tokenizer(texts, return_attention_mask=False, **cut)["input_ids"]
        return [list(each) for each in found]

    def fit(self, sequences: list[list[int]], row: Row) -> list[list[int]] | None:
        """Sequences of one row that belong together, each cut to the limit; None when they are left out.

        What shows images is never cut: it would show half an image.
        """
        self.count.rows += 1
        if all(len(ids) <= self.max_length for ids in sequences):
            fitting = sequences
        elif self.truncation == "delete" or shows(row):
            self.count.deleted += 1
            return None
        else:
            self.count.cut += 1
            kept = slice(-self.max_length, None) if self.truncation == "left" else slice(self.max_length)
            fitting = [ids[kept] for ids in sequences]
        self.count.sequences += len(fitting)
        self.count.tokens += sum(len(ids) for ids in fitting)
        self.count.learnt = self.count.tokens
        return fitting

    def conclude(self) -> Count:
        """What became of the rows. Raises Fault(DataEmpty) when nothing is left."""
        count = self.count
        if not count.sequences:
            raise Fault(
                Reason.DATA_EMPTY,
                f"all {count.rows} rows are longer than dataset.maxLength {self.max_length} and were deleted",
                "Raise dataset.maxLength, or set dataset.truncation to right.",
            )
        if count.deleted or count.cut:
            log.warning("of %d rows, %d were too long and deleted, %d were cut", count.rows, count.deleted, count.cut)
        return count


def joined(sequences: list[list[int]]) -> dict[str, list[int]]:
    """Several sequences in one record: their ids in a row, and the length of each."""
    return {"input_ids": [token for ids in sequences for token in ids], "lengths": [len(ids) for ids in sequences]}


def parted(record: dict[str, list[int]]) -> Iterator[list[int]]:
    """The sequences of such a record."""
    start = 0
    for length in record["lengths"]:
        yield record["input_ids"][start : start + length]
        start += length
