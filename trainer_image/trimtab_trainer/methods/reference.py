"""What a tuned model is held against: another model, the model as it was, or the model without its adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trimtab_trainer import strategies
from trimtab_trainer.arguments import weight_dtype
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model import loading
from trimtab_trainer.model.vision import see_senses
from trimtab_trainer.strategies.fsdp import split_layers
from trimtab_trainer.strategies.zero import without_optimizer

COPY = "ref"
"""What TRL names the copy of an adapter that it holds a tuned adapter against."""


def reference(parts: Parts, field: str | None = None, precomputed: bool = False) -> Any:
    """The model to compare with; None when the tuned one itself can tell, with its adapter off or before it moves.

    `field`: the field that may name another model. It is of the tuned model's precision, so that both begin alike.
    Raises Fault(ModelInvalid) when it does not open, or has other tokens.
    """
    named = parts.further.get(field) if field else None
    how = strategies.of(parts.config).loading()
    if named is not None:
        assert field is not None
        assert parts.base is not None
        loading.see_same_vocabulary(parts.base.path, named.path, field, named.reference)
        if parts.media is not None:
            see_senses(named.path, parts.media.kinds, f"{field} {named.reference}: ")
        return loading.load(named, field, weight_dtype(parts.config), **how)
    if precomputed or parts.config.resolved.tuner_type == "lora":
        return None
    assert parts.base is not None
    return loading.load(parts.base, "model.from", weight_dtype(parts.config), **how)


class Compared(Observed):
    """Mixed into TRL's trainers that compare with a reference, before them in the order of bases.

    For an adapter they keep a copy of it as it was. One that changes nothing yet needs none: the model with its adapter
    off tells the same. A copy that is needed is made anew by each attempt and stands in no checkpoint: transformers
    would resume the copy alone, and leave the tuned adapter as it was at first.
    """

    def __init__(self, **parts: Any):
        arguments, held = parts["args"], parts.get("ref_model")
        if arguments.fsdp and held is not None and not arguments.precompute_ref_log_probs:
            split_layers(held, arguments)
        with without_optimizer(arguments):
            super().__init__(**parts)
        model: Any = getattr(self, "model", None)
        config = getattr(model, "peft_config", {}).get(COPY)
        if config is not None and _begins_at_base(model, config):
            model.delete_adapter(COPY)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = super()
        trainer._save(output_dir, state_dict)
        if output_dir is not None:
            shutil.rmtree(Path(output_dir) / COPY, ignore_errors=True)


def _begins_at_base(model: Any, config: Any) -> bool:
    from peft import LoraConfig

    if not isinstance(config, LoraConfig) or config.init_lora_weights not in (True, "gaussian"):
        return False
    last = [weight for name, weight in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    return all(not weight.detach().any() for weight in last)
