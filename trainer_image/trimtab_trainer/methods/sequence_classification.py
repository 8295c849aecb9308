"""sequenceClassification: a label, several labels or numbers for a whole conversation or text."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data import classification
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model import heads


class SequenceClassification:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Anything that has text, and a label."""
        return classification.needs(heads.classification(config.spec))

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Whole sequences with their labels."""
        return classification.Labelled(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """Cross-entropy, binary cross-entropy or squared error."""
        from trimtab_trainer.methods.judging import labelling

        return labelling(parts)


METHOD = SequenceClassification()
