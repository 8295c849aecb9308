"""embedding: vectors of texts that lie close when the texts belong together."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data import embedding
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model import heads


class EmbeddingMethod:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Texts that belong together, or pairs with a score."""
        return embedding.needs(heads.embedding(config.spec))

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """An anchor, a text beside it, and negatives."""
        return embedding.Related(config, tokenizer, render, heads.embedding(config.spec))

    def trainer(self, parts: Parts) -> Any:
        """Vectors moved by a loss of sentence-transformers."""
        from trimtab_trainer.methods.relating import relating

        return relating(parts)


METHOD = EmbeddingMethod()
