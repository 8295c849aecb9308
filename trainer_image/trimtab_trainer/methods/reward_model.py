"""rewardModel: a number for how good an answer is, learnt from pairs of which the first is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data import preference
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import Row
from trimtab_trainer.data.sequences import Count, Encoder
from trimtab_trainer.data.whole import Tokeniser
from trimtab_trainer.methods.parts import Parts


class Compared:
    """Both conversations of a pair, whole; see sequences.Encoder."""

    columns: tuple[str, ...] = ("chosen_ids", "rejected_ids")

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        self._tokeniser = Tokeniser.of(config, tokenizer, render)

    def encode(self, rows: list[Row]) -> Iterator[Mapping[str, Sequence[float]]]:
        """The records of some rows."""
        ids = iter(self._tokeniser.rows([side for row in rows for side in preference.sides(row)]))
        for row, *both in zip(rows, ids, ids, strict=True):
            fitting = self._tokeniser.fit(both, row)
            if fitting is not None:
                yield dict(zip(self.columns, fitting, strict=True))

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        return self._tokeniser.conclude()


class RewardModel:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """Pairs of answers."""
        return preference.pairs_needed()

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Both answers, each after the prompt."""
        return Compared(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """The likelihood of the preferred answer."""
        from trimtab_trainer.methods.judging import rewarding

        return rewarding(parts)


METHOD = RewardModel()
