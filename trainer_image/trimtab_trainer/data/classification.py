"""Texts and conversations with a label: a number or a name, several of them, or real numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.heads import Classification
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.conversations import parsed
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import IMAGES_ALONE, Row
from trimtab_trainer.data.sequences import TARGETS, Count
from trimtab_trainer.data.whole import Tokeniser


def needs(asked: Classification) -> Needs:
    """What the method asks of rows."""
    return Needs(answer=False, text_allowed=True, shown=IMAGES_ALONE, complete=partial(_labelled, asked))


def _labelled(asked: Classification, raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
    if raw.get("label") is None:
        hint = "Give every row a column 'label', or map one to that name with dataset.train[].columns."
        raise broken(where, row, "has no 'label'", hint)
    value = raw["label"]
    if asked.problem_type == "singleLabel":
        return {**standard, "label": [_index(asked, value, where, row)]}
    if asked.problem_type == "regression":
        return {**standard, "label": _numbers(asked, value, where, row)}
    values = parsed(value)
    if not isinstance(values, list):
        raise broken(where, row, f"'label' is {value!r}; multiLabel wants a list of labels, which may be empty")
    return {**standard, "label": sorted({_index(asked, each, where, row) for each in values})}


def _index(asked: Classification, value: Any, where: str, row: int) -> int:
    """The number of a label that is given by number or name. Raises Fault(DataInvalid) when there is no such label."""
    if asked.labels is not None and isinstance(value, str) and value in asked.labels:
        return asked.labels.index(value)
    number = parsed(value)
    if isinstance(number, bool):
        number = int(number)
    if not isinstance(number, int):
        known = f"one of {', '.join(asked.labels[:8])}" if asked.labels else f"a number from 0 to {asked.size - 1}"
        raise broken(where, row, f"'label' is {value!r}; it must be {known}")
    if not 0 <= number < asked.size:
        raise broken(
            where,
            row,
            f"'label' is {number}; there are {asked.size} labels, 0 to {asked.size - 1}",
            "Correct the row, or classification.numLabels.",
        )
    return number


def _numbers(asked: Classification, value: Any, where: str, row: int) -> list[float]:
    found = parsed(value)
    numbers = found if isinstance(found, list) else [found]
    if len(numbers) != asked.size or not all(_real(each) for each in numbers):
        wanted = "a number" if asked.size == 1 else f"a list of {asked.size} numbers"
        raise broken(where, row, f"'label' is {value!r}; regression wants {wanted}")
    return [float(each) for each in numbers]


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Labelled:
    """Sequences with their targets: label numbers, or real numbers; see sequences.Encoder."""

    columns: tuple[str, ...] = ("input_ids", TARGETS)

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        self._tokeniser = Tokeniser.of(config, tokenizer, render)

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """The records of some rows."""
        for row, ids in zip(rows, self._tokeniser.rows(rows), strict=True):
            for fitting in self._tokeniser.fit([ids], row) or ():
                yield {"input_ids": fitting, TARGETS: [float(each) for each in row["label"]]}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        return self._tokeniser.conclude()
