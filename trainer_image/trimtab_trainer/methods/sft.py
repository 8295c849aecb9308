"""sft: the assistant's answers are learnt, given what came before them."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import KINDS
from trimtab_trainer.data.sequences import Encoder, Language, Shaping
from trimtab_trainer.methods.parts import Parts


class Sft:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Conversations that end with an answer; plain text only when every token is learnt."""
        return Needs(answer=True, text_allowed=config.resolved.loss == "all", shown=KINDS, boxes=True)

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Conversations stay whole unless the spec cuts them."""
        return Language(tokenizer, render, Shaping.of(config, ends_document=False))

    def trainer(self, parts: Parts) -> Any:
        """Next-token prediction on the tokens that the masks leave."""
        from trimtab_trainer.methods.causal import causal

        return causal(parts)


METHOD = Sft()
