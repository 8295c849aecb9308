"""Texts in tokens, by a tokenizer's file alone: neither torch nor transformers is needed to count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

BATCH = 256
"""Texts that are tokenised at once."""


@dataclass(frozen=True)
class Measured:
    """How long some texts are."""

    texts: int
    tokens: int
    longest: int
    """Tokens of the longest."""
    longer: int
    """Texts of more tokens than the limit."""

    def told(self, rows: int, truncation: str) -> str:
        """What is to be said of `rows` rows, of which these were counted, after a sentence about them.

        A row may have several texts; what more rows hold is concluded from those that were counted.
        """
        part = max(rows / self.texts, 1)
        about = "" if part == 1 else "about "
        fate = {"delete": "deleted", "split": "split"}.get(truncation, "cut")
        share = f", {100 * self.longer / self.texts:.2g} % are longer than maxLength and will be {fate}"
        return (
            f"; {about}{_amount(self.tokens * part)} tokens, {self.longest} in the longest row"
            f"{share if self.longer else ''}"
        )


def measure(texts: Sequence[str], folder: Path, limit: int) -> Measured:
    """Count texts with the tokenizer.json in a folder; `limit`: tokens beyond which a text is too long."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    sizes: list[int] = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(list(texts[start : start + BATCH]), add_special_tokens=False)
        sizes += [len(each) for each in encoded]
    return Measured(len(sizes), sum(sizes), max(sizes, default=0), sum(size > limit for size in sizes))


def _amount(number: float) -> str:
    for size, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.0f}"
