"""sft: the assistant's answers are learnt, given what came before them."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.sequences import Shaping


class Sft:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Conversations that end with an answer; plain text only when every token is learnt."""
        return Needs(answer=True, text_allowed=config.resolved.loss == "all")

    def shaping(self, config: RunConfig) -> Shaping:
        """Conversations stay whole unless the spec cuts them."""
        resolved = config.resolved
        return Shaping(resolved.loss, resolved.truncation, config.spec.dataset.max_length, ends_document=False)

    def trainer(self, **parts: Any) -> Any:
        """Next-token prediction on the tokens that the masks leave."""
        from trimtab_trainer.methods.causal import CausalTrainer

        return CausalTrainer(**parts)


METHOD = Sft()
