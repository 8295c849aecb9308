"""The tuning methods, one room each: what rows it needs, how they become sequences, which trainer learns from them."""

from __future__ import annotations

from typing import Any, Protocol

from trimtab_api.contract import RunConfig
from trimtab_trainer.data import prompts
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import KINDS
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods import (
    cpo,
    dpo,
    embedding,
    gkd,
    grpo,
    kto,
    orpo,
    ppo,
    pretrain,
    reranker,
    reward_model,
    sequence_classification,
    sft,
    simpo,
)
from trimtab_trainer.methods.parts import Parts


class Method(Protocol):
    """What is special about a method; each is a room of its own in this folder."""

    def needs(self, config: RunConfig) -> Needs:
        """What it asks of rows."""
        ...

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """How its rows become records of token ids. Without torch: the preflight uses it as well."""
        ...

    def trainer(self, parts: Parts) -> Any:
        """The trainer that learns from the records: a transformers.Trainer with methods.observed.Observed mixed in."""
        ...


METHODS: dict[str, Method] = {
    "pretrain": pretrain.METHOD,
    "sft": sft.METHOD,
    "dpo": dpo.METHOD,
    "kto": kto.METHOD,
    "cpo": cpo.METHOD,
    "simpo": simpo.METHOD,
    "orpo": orpo.METHOD,
    "grpo": grpo.METHOD,
    "ppo": ppo.METHOD,
    "gkd": gkd.METHOD,
    "rewardModel": reward_model.METHOD,
    "sequenceClassification": sequence_classification.METHOD,
    "embedding": embedding.METHOD,
    "reranker": reranker.METHOD,
}
"""By the name that a spec uses."""


def needs_of(config: RunConfig) -> Needs:
    """What a job asks of rows: what its method asks, or, where nothing is learnt, that there is something to answer."""
    return METHODS[config.spec.method].needs(config) if config.spec.learns else prompts.needed(shown=KINDS)
