"""Texts that belong together or do not.

A row is an anchor with positives and, maybe, negatives (as columns, or as messages of one turn in positive_messages and
negative_messages), or two sentences with a score. An embedder reads texts, not conversations: what it will be given
later is one text at a time, and never a chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.heads import Embedding
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.conversations import parsed
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import Row
from trimtab_trainer.data.sequences import TARGETS, Count
from trimtab_trainer.data.whole import Tokeniser, joined

ANCHORS = ("anchor", "query", "sentence1")
"""Names of the column with the text that is looked from."""
_POSITIVES = re.compile(r"positives?(_\d+)?|pos|sentence2")
_NEGATIVES = re.compile(r"negatives?(_\d+)?|neg")
_ROW_HINT = (
    "Give anchor and positive, sentence1 and sentence2 with score, or messages with positive_messages; "
    "or map names with dataset.train[].columns."
)


def needs(asked: Embedding) -> Needs:
    """What the method asks of rows."""
    return Needs(answer=False, text_allowed=True, reshape=_anchored, complete=partial(_related, asked))


def texts(raw: Mapping[str, Any], column: str, where: str, row: int) -> list[str]:
    """The texts of a column that holds one or a list.

    Raises Fault(DataInvalid) when one is no text or empty.
    """
    value = parsed(raw[column])
    found = value if isinstance(value, list) else [raw[column]]
    for index, each in enumerate(found):
        if not isinstance(each, str) or not each.strip():
            name = f"'{column}[{index}]'" if isinstance(value, list) else f"'{column}'"
            raise broken(where, row, f"{name} must be text that is not empty")
    return found


def turns(raw: Mapping[str, Any], column: str, where: str, row: int) -> list[list[dict[str, Any]]]:
    """The lists of messages in a column; one list of messages stands for itself.

    A message without a role is the assistant's.

    Raises Fault(DataInvalid) when a message has no content.
    """
    value = parsed(raw[column])
    found = [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value
    if not isinstance(found, list) or not all(isinstance(each, list) and each for each in found):
        raise broken(where, row, f"'{column}' must be a list of lists of messages")
    for messages in found:
        for each in messages:
            content = each.get("content") if isinstance(each, dict) else None
            if not isinstance(content, str) or not content.strip():
                raise broken(where, row, f"'{column}' has a message without text in 'content'")
    return [[{"role": each.get("role", "assistant"), "content": each["content"]} for each in turn] for turn in found]


def columns_like(raw: Mapping[str, Any], pattern: re.Pattern[str]) -> list[str]:
    """Names of the columns that have a value, in the order of the row."""
    return [name for name, value in raw.items() if pattern.fullmatch(name) and value is not None]


def _anchored(raw: Mapping[str, Any], _text: bool, where: str, row: int) -> Mapping[str, Any]:
    """The anchor as the text of the row, whatever its column is called."""
    if "messages" in raw or "text" in raw:
        return raw
    name = next((each for each in ANCHORS if each in raw), None)
    if name is None:
        raise broken(where, row, f"columns {', '.join(sorted(raw)) or '(none)'} have no anchor", _ROW_HINT)
    return {"text" if key == name else key: value for key, value in raw.items()}


def _related(asked: Embedding, raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
    anchor = standard["text"] if "text" in standard else _only(standard["messages"], "messages", where, row)
    positives = _others(raw, _POSITIVES, "positive_messages", where, row)
    negatives = _others(raw, _NEGATIVES, "negative_messages", where, row)
    if not positives:
        raise broken(where, row, "has nothing that belongs to its anchor", _ROW_HINT)
    scored = raw.get("score", raw.get("label"))
    if asked.loss == "infonce":
        if scored is not None:
            hint = "Set embedding.loss: cosineSimilarity or contrastive, or give positive and negative texts."
            raise broken(where, row, "has a score, and infonce learns from texts that belong together", hint)
        limit = len(negatives) if asked.hard_negatives is None else asked.hard_negatives
        if limit > len(negatives):
            hint = "Give the row more negatives, or lower embedding.hardNegatives."
            raise broken(where, row, f"has {len(negatives)} negatives of embedding.hardNegatives {limit}", hint)
        return {"text": anchor, "positives": positives, "negatives": negatives[:limit]}
    return {"text": anchor, "pairs": _pairs(asked, positives, negatives, scored, where, row)}


def _pairs(
    asked: Embedding, positives: list[str], negatives: list[str], scored: Any, where: str, row: int
) -> list[list[Any]]:
    """Texts with what their closeness to the anchor shall be."""
    if scored is None:
        if not negatives:
            hint = f"Give sentence1, sentence2 and score, or negatives; {asked.loss} has nothing to keep apart else."
            raise broken(where, row, "has neither a score nor negatives", hint)
        return [*([text, 1.0] for text in positives), *([text, 0.0] for text in negatives)]
    score = parsed(scored)
    if isinstance(score, bool):
        score = int(score)
    if len(positives) != 1 or negatives:
        raise broken(where, row, "has one score for several texts", "Write one pair a row.")
    if not isinstance(score, int | float):
        raise broken(where, row, f"the score is {scored!r}; it must be a number")
    if asked.loss == "cosineSimilarity" and not -1 <= score <= 1:
        raise broken(where, row, f"the score is {score}; a cosine lies between -1 and 1", "Scale the scores.")
    if asked.loss != "cosineSimilarity" and score not in (0, 1):
        raise broken(where, row, f"the score is {score}; {asked.loss} takes 1 (belong together) or 0 (do not)")
    return [[positives[0], float(score)]]


def _others(raw: Mapping[str, Any], names: re.Pattern[str], spoken: str, where: str, row: int) -> list[str]:
    found = [text for name in columns_like(raw, names) for text in texts(raw, name, where, row)]
    if raw.get(spoken):
        found += [_only(messages, spoken, where, row) for messages in turns(raw, spoken, where, row)]
    return found


def _only(messages: list[dict[str, Any]], column: str, where: str, row: int) -> str:
    if len(messages) != 1:
        hint = "Write one text a message; what stands before every query belongs into embedding.instruction."
        raise broken(where, row, f"'{column}' has {len(messages)} messages; an embedder reads one text", hint)
    return str(messages[0]["content"])


class Related:
    """Records of an anchor, another text and negatives, with the closeness of the two; see sequences.Encoder."""

    columns: tuple[str, ...] = ("input_ids", "lengths", TARGETS)

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None, asked: Embedding):
        self._tokeniser = Tokeniser.of(config, tokenizer, render)
        self._before = asked.instruction or ""

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """The records of some rows; a row makes one for each text that it relates to its anchor."""
        groups = [(row, *group) for row in rows for group in self._groups(row)]
        ids = iter(self._tokeniser.texts([text for _, texts, _ in groups for text in texts]))
        for row, members, score in groups:
            fitting = self._tokeniser.fit([next(ids) for _ in members], row)
            if fitting is not None:
                yield {**joined(fitting), TARGETS: [score]}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        return self._tokeniser.conclude()

    def _groups(self, row: Row) -> Iterator[tuple[list[str], float]]:
        anchor = self._before + row["text"]
        for positive in row.get("positives", ()):
            yield [anchor, positive, *row["negatives"]], 1.0
        for other, score in row.get("pairs", ()):
            yield [anchor, other], score
