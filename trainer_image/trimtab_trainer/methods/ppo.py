"""ppo: the model answers, a reward model judges, and each token learns by how much better it went than expected."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.rollout import Ppo
from trimtab_trainer.data import prompts
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts


class Proximal:
    """See methods.Method."""

    def needs(self, _config: RunConfig) -> Needs:
        """Prompts."""
        return prompts.needed()

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Prompts as a server would be asked them."""
        return prompts.Prompts(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """Our own: the library has none."""
        from trimtab_trainer.methods.proximal import proximal

        return proximal(parts)


def knobs(config: RunConfig) -> Ppo:
    """The method's block; the rules see to it that it is there."""
    assert config.spec.ppo is not None
    return config.spec.ppo


METHOD = Proximal()
