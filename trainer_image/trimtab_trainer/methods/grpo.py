"""grpo: the model answers each prompt several times, and learns from which answers earned more than the others."""

from __future__ import annotations

from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.rollout import Grpo
from trimtab_trainer import rewards
from trimtab_trainer.data import prompts
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import IMAGES_ALONE
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.rewards import written


class GroupRelative:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Prompts, with the columns that the rewards read.

        Raises Fault(SpecInvalid) when a step would learn from a part of a group of answers, or a reward of the user's
        is none.
        """
        asked, batch = knobs(config), config.resolved.global_batch_size
        if batch % asked.num_generations:
            raise Fault(
                Reason.SPEC_INVALID,
                f"grpo.numGenerations: {asked.num_generations} does not divide the global batch of {batch} answers "
                "(training.perDeviceBatchSize x training.gradientAccumulationSteps x processes)",
                "Leave training.gradientAccumulationSteps out, or choose it so that it does.",
            )
        # A reward model reads conversations as text, and an engine beside the trainer is asked in tokens.
        seeing = not config.spec.asks_vllm and all(reward.reward_model is None for reward in asked.rewards)
        return prompts.needed(*_columns_read(config), shown=IMAGES_ALONE if seeing else ())

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Prompts as a server would be asked them."""
        return prompts.Prompts(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """TRL's, with our prompts, our engine and our rewards."""
        from trimtab_trainer.methods.grouped import grouped

        return grouped(parts)


def knobs(config: RunConfig) -> Grpo:
    """The method's block; the rules see to it that it is there."""
    assert config.spec.grpo is not None
    return config.spec.grpo


def _columns_read(config: RunConfig) -> list[str]:
    """The columns that the rewards need of each row."""
    read: set[str] = set()
    for number, reward in enumerate(knobs(config).rewards):
        read |= rewards.columns_read(reward.name)
        if reward.python is not None:
            read |= written.look(written.code_of(config, number), reward.python.function).columns
    return sorted(read)


METHOD = GroupRelative()
