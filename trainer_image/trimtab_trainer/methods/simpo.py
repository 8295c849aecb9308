"""simpo: of two answers the better one is learnt to be likelier per token than the other by a margin; no reference."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.preference import Pairs, pairs_needed
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts


class Simpo:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """Two answers to one prompt, the better one first."""
        return pairs_needed()

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Both answers, each after the prompt."""
        return Pairs(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """The difference of mean log-probabilities, less a margin."""
        from trimtab_trainer.methods.reference_free import simple

        return simple(parts)


METHOD = Simpo()
