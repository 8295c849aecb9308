"""The tuning methods, one room each: what rows it needs, how they become sequences, which trainer learns from them."""

from __future__ import annotations

from typing import Any, Protocol

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.sequences import Shaping
from trimtab_trainer.methods import pretrain, sft


class Method(Protocol):
    """What is special about a method."""

    def needs(self, config: RunConfig) -> Needs:
        """What it asks of rows."""
        ...

    def shaping(self, config: RunConfig) -> Shaping:
        """How its rows become sequences."""
        ...

    def trainer(self, **parts: Any) -> Any:
        """The trainer that learns from the sequences; parts are the keyword arguments of transformers.Trainer."""
        ...


METHODS: dict[str, Method] = {"pretrain": pretrain.METHOD, "sft": sft.METHOD}
"""By the name that a spec uses."""
