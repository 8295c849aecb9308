"""gkd: the student takes over a teacher's next-token distributions, on rows and on what it says itself."""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.rollout import Gkd
from trimtab_trainer.data import prompts
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.rows import IMAGES_ALONE
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.methods.parts import Parts


class Distilled:
    """See methods.Method."""

    def needs(self, config: RunConfig) -> Needs:
        """Conversations that end with an answer; prompts will do when the student always answers itself."""
        shown = () if config.spec.asks_vllm else IMAGES_ALONE
        return prompts.needed(answer=knobs(config).lmbda < 1, shown=shown)

    def encoder(self, config: RunConfig, tokenizer: Any, render: Render | None) -> Encoder:
        """Prompts, and the rows' last answers."""
        return prompts.Prompts(config, tokenizer, render)

    def trainer(self, parts: Parts) -> Any:
        """Our own: the library's stable one never learns from rows."""
        from trimtab_trainer.methods.distilling import distilling

        return distilling(parts)


def knobs(config: RunConfig) -> Gkd:
    """The method's block; the rules see to it that it is there."""
    assert config.spec.gkd is not None
    return config.spec.gkd


METHOD = Distilled()
