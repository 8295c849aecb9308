"""kto: good answers are learnt to be likelier than a reference finds them, bad ones less likely, each by itself."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.preference import Judgements, judgements_needed
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts


class Kto:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """An answer with a label, or a pair, which is taken apart."""
        return judgements_needed()

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Each answer after its prompt, with its label."""
        return Judgements(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """TRL's KTOTrainer."""
        from trimtab_trainer.methods.judged import judged

        return judged(parts)


METHOD = Kto()
