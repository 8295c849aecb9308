"""Queries with documents that answer them or do not.

A row is a query (as a conversation, or in the column query) with documents: positive and negative ones as columns, or
as messages in positive_messages and negative_messages, or one document with a label. Query and document are read
together, as a conversation in which the document is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.heads import Reranker
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.conversations import parsed
from trimtab_trainer.data.embedding import columns_like, texts, turns
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import IMAGES_ALONE, Row
from trimtab_trainer.data.sequences import TARGETS, Count
from trimtab_trainer.data.whole import Tokeniser, joined

_POSITIVES = re.compile(r"positives?(_\d+)?|pos")
_NEGATIVES = re.compile(r"negatives?(_\d+)?|neg")


def needs(asked: Reranker) -> Needs:
    """What the method asks of rows."""
    return Needs(answer=False, text_allowed=False, shown=IMAGES_ALONE, complete=partial(_ranked, asked))


def _ranked(asked: Reranker, raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
    positives = _documents(raw, _POSITIVES, "positive_messages", where, row)
    negatives = _documents(raw, _NEGATIVES, "negative_messages", where, row)[: asked.max_negatives]
    if raw.get("document") is not None:
        if positives or negatives:
            raise broken(where, row, "has both 'document' and positive or negative ones", "Give one of them.")
        return {**standard, "groups": [_judged(asked, raw, where, row)]}
    if not positives:
        hint = "Give positive and negative, positive_messages and negative_messages, or document and label."
        raise broken(where, row, "has no document that answers its query", hint)
    if asked.loss == "listwise" and not negatives:
        raise broken(where, row, "has no negative document, and listwise compares with them", "Give negatives.")
    return {**standard, "groups": [_group(each, negatives) for each in positives]}


def _group(positive: list[dict[str, Any]], negatives: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {"documents": [positive, *negatives], "scores": [1.0, *(0.0 for _ in negatives)]}


def _judged(asked: Reranker, raw: Mapping[str, Any], where: str, row: int) -> dict[str, Any]:
    if asked.loss == "listwise":
        hint = "Set reranker.loss: pointwise, or give positive and negative documents."
        raise broken(where, row, "has one document, and listwise compares several", hint)
    label = parsed(raw.get("label"))
    label = int(label) if isinstance(label, bool) else label
    if not isinstance(label, int | float) or not 0 <= label <= 1:
        raise broken(where, row, f"'label' is {raw.get('label')!r}; it must be between 0 (no answer) and 1")
    document = texts(raw, "document", where, row)
    if len(document) != 1:
        raise broken(where, row, "has one label for several documents", "Write one document a row.")
    return {"documents": [_answer(document[0])], "scores": [float(label)]}


def _documents(
    raw: Mapping[str, Any], names: re.Pattern[str], spoken: str, where: str, row: int
) -> list[list[dict[str, Any]]]:
    found = [_answer(text) for name in columns_like(raw, names) for text in texts(raw, name, where, row)]
    return found + (turns(raw, spoken, where, row) if raw.get(spoken) else [])


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


class Ranked:
    """Records of a query with each of its documents; see sequences.Encoder."""

    columns: tuple[str, ...] = ("input_ids", "lengths", TARGETS)

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        self._tokeniser = Tokeniser.of(config, tokenizer, render)

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """The records of some rows; a row makes one for each document that answers it."""
        groups = [(row, group) for row in rows for group in row["groups"]]
        whole = [
            {**row, "messages": [*row["messages"], *document]}
            for row, group in groups
            for document in group["documents"]
        ]
        ids = iter(self._tokeniser.rows(whole))
        for row, group in groups:
            fitting = self._tokeniser.fit([next(ids) for _ in group["documents"]], row)
            if fitting is not None:
                yield {**joined(fitting), TARGETS: group["scores"]}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        return self._tokeniser.conclude()
