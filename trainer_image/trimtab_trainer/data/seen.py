"""Rows that show something as records: it stands in the token ids themselves, once for each token that it becomes.

Where a model has a placeholder, a record has -1 - n, n being the place in Media.shown. So lengths, labels and masks are
right from the beginning, and whatever is made of token ids (pairs, prompts, batches) says what it shows. A batch opens
it and puts placeholders there; see methods.vision.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.opened import About, Media
from trimtab_trainer.data.prompts import PROMPT
from trimtab_trainer.data.rows import COLUMNS, KINDS, Kind, Row, shown
from trimtab_trainer.data.sequences import IGNORED, Count, Encoder
from trimtab_trainer.endings import Fault

_IDS = ("input_ids", "chosen_ids", "rejected_ids", PROMPT)
_LABELS = ("labels", "chosen_labels", "rejected_labels")
"""Columns of token ids and of their labels, whatever the method."""


@dataclass(frozen=True)
class Standing:
    """What stands in texts for what the rows of a run show."""

    media: Media
    placeholders: Mapping[Kind, str]
    ids: Mapping[Kind, int]
    """The placeholders as tokens."""
    text: Callable[[About], str]
    """What a placeholder becomes: as many of it as there are tokens, with whatever is written between them."""

    def of(self, kind: Kind, name: str) -> str:
        """By its whole name."""
        return self.text(self.media.shown[self.media.index[kind, name]].about)

    def marks(self, kind: Kind, name: str) -> list[int]:
        """What stands in its place in token ids."""
        return [-1 - self.media.index[kind, name]] * self.of(kind, name).count(self.placeholders[kind])

    def marked(self, ids: Sequence[int], row: Row) -> list[int]:
        """Token ids with marks in the place of placeholders; when they show the whole row again, again."""
        marks: dict[int, list[int]] = defaultdict(list)
        for kind, name in shown(row):
            marks[self.ids[kind]] += self.marks(kind, name)
        told = {token: cycle(values) for token, values in marks.items()}
        return [next(told[token]) if token in told else token for token in ids]


def spacious(render: Render, standing: Standing) -> Render:
    """The renderer with the whole text of what is shown in the place of placeholders.

    It raises Fault(DataInvalid) when the template does not write one placeholder for each.
    """
    kinds = {token: kind for kind, token in standing.placeholders.items()}
    places = re.compile("|".join(map(re.escape, kinds)))

    def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
        text = render(messages, **options)
        parts = [part for each in messages for part in _parts(each)]
        named = [(kind, part[kind]) for part in parts for kind in KINDS if part["type"] == kind]
        found = places.findall(text)
        if [kinds[each] for each in found] != [kind for kind, _ in named]:
            raise _unequal([kind for kind, _ in named], found)
        told = iter(named)
        return places.sub(lambda _: standing.of(*next(told)), text)

    return rendered


def _unequal(wanted: list[Kind], found: list[str]) -> Fault:
    shows = ", ".join(f"{wanted.count(kind)} {COLUMNS[kind]}" for kind in KINDS if kind in wanted) or "nothing"
    has = ", ".join(f"{found.count(token)} {token}" for token in dict.fromkeys(found)) or "no placeholder"
    problem = f"a conversation shows {shows} and has {has} in its text"
    return Fault(Reason.DATA_INVALID, problem, "Leave such tokens out of texts, or set template.chatTemplate.")


def _parts(message: Mapping[str, Any]) -> list[dict[str, str]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


class Seen:
    """An encoder whose rows may show something; see sequences.Encoder. Its renderer is a spacious one."""

    def __init__(self, encoder: Encoder, standing: Standing, boxes: Callable[[Row], Row] = dict):
        self.columns = encoder.columns
        self._boxes = boxes
        self._encoder = encoder
        self._standing = standing
        self._placeholders = set(standing.ids.values())
        self._unlearnt = 0

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """See sequences.Encoder."""
        for row in rows:
            for record in self._encoder.encode([self._boxes(row)]):
                yield {name: self._marked(name, values, row) for name, values in record.items()}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        count = self._encoder.conclude()
        count.learnt -= self._unlearnt
        return count

    def _marked(self, column: str, values: Sequence[float], row: Row) -> Sequence[float]:
        if column in _LABELS:
            kept = [IGNORED if value in self._placeholders else value for value in values]
            self._unlearnt += sum(value in self._placeholders for value in values)
            return kept
        return self._standing.marked([int(value) for value in values], row) if column in _IDS else values
