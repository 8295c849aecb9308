"""Conversations with images as records: token ids with one placeholder an image, and which images they are.

The images stay files; a batch opens them, and each placeholder then becomes as many tokens as its image needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from trimtab_trainer.data.media import Media
from trimtab_trainer.data.rows import IMAGES, Row
from trimtab_trainer.data.sequences import Language

MEDIA = "media"
"""Column with the places of a row's images in Media.paths."""

Lengths = Callable[[Sequence[tuple[int, int]]], list[int]]
"""From heights and widths in pixels to the tokens that each image becomes."""


class Seen(Language):
    """Language whose rows may show images. Such a row is kept whole or deleted: cut, it would show half an image."""

    def __init__(self, language: Language, media: Media, lengths: Lengths):
        super().__init__(language.tokenizer, language.render, language.shaping)
        self.columns = (*language.columns, MEDIA)
        self._media = media
        self._lengths = lengths

    def encode(self, rows: list[Row]) -> Iterator[dict[str, Sequence[float]]]:
        """See Encoder."""
        for row in rows:
            shown = [self._media.index[name] for name in row.get(IMAGES, [])]
            shaping = self.shaping
            if shown:
                tokens = sum(self._lengths([self._media.sizes[number] for number in shown])) - len(shown)
                shaping = replace(shaping, truncation="delete", max_length=shaping.max_length - tokens)
            for record in self.records([row], shaping):
                yield {**record, MEDIA: shown}
