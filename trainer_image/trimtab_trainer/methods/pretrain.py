"""pretrain: every token of text or of rendered conversations is learnt; the end-of-text token separates documents."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import KINDS
from trimtab_trainer.data.sequences import Encoder, Language, Shaping
from trimtab_trainer.methods.parts import Parts


class Pretrain:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """Anything that has text."""
        return Needs(answer=False, text_allowed=True, shown=KINDS, boxes=True)

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Long documents are split, not lost."""
        return Language(tokenizer, render, Shaping.of(config, ends_document=True))

    def trainer(self, parts: Parts) -> Any:
        """Next-token prediction."""
        from trimtab_trainer.methods.causal import causal

        return causal(parts)


METHOD = Pretrain()
