"""reranker: a score for how well a document answers a query, from reading both together."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.heads import Reranker as Settings
from trimtab_trainer.data import ranking
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts


class Reranker:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Queries with documents."""
        return ranking.needs(config.spec.reranker or Settings())

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Each document after its query."""
        return ranking.Ranked(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """Each document by itself, or a positive against the negatives."""
        from trimtab_trainer.methods import judging

        return judging.ranking(parts)


METHOD = Reranker()
