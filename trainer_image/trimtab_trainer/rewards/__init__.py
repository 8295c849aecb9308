"""What answers earn: formulas by name, models that judge, and functions of the user's.

A reward is asked about some answers at once and gives each a number, or None where it has nothing to say. Nothing here
knows of trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimtab_trainer.rewards import named


@dataclass(frozen=True)
class Said:
    """An answer, and what it answers."""

    messages: list[dict[str, Any]]
    """The conversation before it."""
    text: str
    """The answer without special tokens."""
    ids: Sequence[int]
    """Its tokens, the one that ends it included."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""
    place: str = ""
    """How a person finds the row: source and number."""

    @property
    def tokens(self) -> int:
        """Its length in tokens."""
        return len(self.ids)


class Reward(Protocol):
    """What some answers earn."""

    def __call__(self, said: Sequence[Said]) -> Sequence[float | None]:
        """A number for each; None leaves an answer out."""
        ...


READS_SOLUTION = frozenset({"accuracy", "cosine"})
"""Names of the rewards that need the column `solution`."""


def by_name(name: str, longest: int) -> Reward:
    """The reward of that name; `longest` is the most tokens that an answer can have."""
    formulas: dict[str, Callable[[Said], float]] = {
        "accuracy": lambda said: named.accuracy(said.text, said.columns["solution"]),
        "format": lambda said: named.format_(said.text),
        "softOverlong": lambda said: named.soft_overlong(said.tokens, longest),
        "repetition": lambda said: named.repetition(said.text),
        "cosine": lambda said: named.cosine(
            named.accuracy(said.text, said.columns["solution"]) == 1, said.tokens, longest
        ),
    }
    formula = formulas[name]
    return lambda said: [formula(each) for each in said]


def columns_read(name: str | None) -> frozenset[str]:
    """The columns that the reward of that name needs of each row."""
    return frozenset({"solution"} if name in READS_SOLUTION else ())
