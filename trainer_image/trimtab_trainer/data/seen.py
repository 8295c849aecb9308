"""Rows that show images as records: an image stands in the token ids themselves, once for each token that it becomes.

Where a model has a placeholder, a record has -1 - n, n being the image's place in Media.paths. So lengths, labels and
masks are right from the beginning, and whatever is made of token ids (pairs, prompts, batches) says what it shows. A
batch opens the images and puts their tokens there; see methods.vision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.media import Media
from trimtab_trainer.data.prompts import PROMPT
from trimtab_trainer.data.rows import IMAGES, Row
from trimtab_trainer.data.sequences import IGNORED, Count, Encoder
from trimtab_trainer.endings import Fault

_IDS = ("input_ids", "chosen_ids", "rejected_ids", PROMPT)
_LABELS = ("labels", "chosen_labels", "rejected_labels")
"""Columns of token ids and of their labels, whatever the method."""


@dataclass(frozen=True)
class Sizes:
    """How many tokens the images of a run become."""

    media: Media
    lengths: Callable[[Sequence[tuple[int, int]]], list[int]]
    """From heights and widths in pixels to numbers of tokens."""

    def of(self, names: Sequence[str]) -> list[int]:
        """By the images' whole names."""
        return self.lengths([self.media.size(name) for name in names]) if names else []


def spacious(render: Render, placeholder: str, sizes: Sizes) -> Render:
    """The renderer with as many placeholders for each image as it becomes tokens.

    It raises Fault(DataInvalid) when the template does not write one placeholder for each image.
    """

    def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
        text = render(messages, **options)
        names = [part["image"] for each in messages for part in _parts(each) if part["type"] == "image"]
        first, *others = text.split(placeholder)
        if len(others) != len(names):
            problem = f"a conversation shows {len(names)} images and has {len(others)} {placeholder} in its text"
            raise Fault(Reason.DATA_INVALID, problem, "Leave that token out of texts, or set template.chatTemplate.")
        return first + "".join(
            placeholder * length + other for length, other in zip(sizes.of(names), others, strict=True)
        )

    return rendered


def _parts(message: Mapping[str, Any]) -> list[dict[str, str]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


class Seen:
    """An encoder whose rows may show images; see sequences.Encoder. Its renderer is a spacious one."""

    def __init__(self, encoder: Encoder, placeholder_id: int, sizes: Sizes, boxes: Callable[[Row], Row] = dict):
        self.columns = encoder.columns
        self._boxes = boxes
        self._encoder = encoder
        self._placeholder = placeholder_id
        self._sizes = sizes
        self._unlearnt = 0

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """See sequences.Encoder."""
        for row in rows:
            names: list[str] = row.get(IMAGES, [])
            marks = [
                -1 - self._sizes.media.index[name]
                for name, length in zip(names, self._sizes.of(names), strict=True)
                for _ in range(length)
            ]
            for record in self._encoder.encode([self._boxes(row)]):
                yield {name: self._marked(name, values, marks) for name, values in record.items()}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        count = self._encoder.conclude()
        count.learnt -= self._unlearnt
        return count

    def _marked(self, column: str, values: Sequence[float], marks: list[int]) -> Sequence[float]:
        """Images in the place of placeholders; each sequence of a record shows all of its row's images anew."""
        if column in _LABELS:
            kept = [IGNORED if value == self._placeholder else value for value in values]
            self._unlearnt += sum(value == self._placeholder for value in values)
            return kept
        if column not in _IDS or not marks:
            return values
        marked, place = list(values), 0
        for position, value in enumerate(values):
            if value == self._placeholder:
                marked[position] = marks[place % len(marks)]
                place += 1
        return marked
