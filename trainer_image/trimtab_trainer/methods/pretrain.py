"""pretrain: every token of text or of rendered conversations is learnt; the end-of-text token separates documents."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.sequences import Shaping


class Pretrain:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """Anything that has text."""
        return Needs(answer=False, text_allowed=True)

    def shaping(self, config: RunConfig) -> Shaping:
        """Long documents are split, not lost."""
        resolved = config.resolved
        return Shaping(resolved.loss, resolved.truncation, config.spec.dataset.max_length, ends_document=True)

    def trainer(self, **parts: Any) -> Any:
        """Next-token prediction."""
        from trimtab_trainer.methods.causal import CausalTrainer

        return CausalTrainer(**parts)


METHOD = Pretrain()
