"""The model as it was at the start, for methods that measure how far it has moved.

With an adapter it is a second, frozen adapter that begins as a copy: without any adapter the model would only be the
same when the first one begins at nothing. With full tuning it is a second model. Neither is published or saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from trimtab_api import inputs
from trimtab_trainer import strategies
from trimtab_trainer.arguments import weight_dtype
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model import loading

NAME = "ref"
"""The adapter's name; the library's grpo uses the same."""
_TRAINED = ".default"


def is_adapted(model: Any) -> bool:
    """Whether the model is wrapped with an adapter."""
    return hasattr(model, "peft_config")


def keep_adapter(model: Any) -> None:
    """Copy the adapter that is trained into a frozen one, or bring that up to date."""
    if NAME not in model.peft_config:
        model.add_adapter(NAME, model.peft_config["default"])
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        kept = weights.get(name.replace(_TRAINED, f".{NAME}"))
        if kept is not None and kept is not weight:
            kept.data.copy_(weight.data)
            kept.requires_grad_(False)


def drop_adapter(model: Any) -> None:
    """Take the copy away."""
    if is_adapted(model) and NAME in model.peft_config:
        model.delete_adapter(NAME)


def second(parts: Parts) -> Any:
    """The model that is tuned in full as it was at the start, opened anew: what is split as it is loaded has no copy.

    None beside an adapter, which needs none. It is not laid out yet.
    """
    if is_adapted(parts.model):
        return None
    assert parts.base is not None, "the rules ask for a model that speaks"
    how = strategies.of(parts.config).loading()
    opened = loading.load(parts.base, inputs.MODEL, weight_dtype(parts.config), **how)
    disable_dropout_in_model(opened)
    return opened.eval().requires_grad_(False)


class Reference:
    """Asks the model as it was."""

    def __init__(self, model: Any, other: Any):
        self.second = other
        """The second model, when there is one."""
        if other is None:
            keep_adapter(model)

    @contextmanager
    def of(self, model: Any) -> Iterator[Any]:
        """The model to ask in place of `model`."""
        if self.second is not None:
            yield self.second
            return
        with use_adapter(model, adapter_name=NAME):
            yield model


class Referring:
    """Mixed into a transformers.Trainer, before it in the order of bases: a copied adapter enters no checkpoint."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        base: Any = super()
        trainer: Any = self
        base._save(output_dir, state_dict=state_dict)
        # With it there a run that goes on would load the copy alone.
        shutil.rmtree(Path(output_dir or trainer.args.output_dir) / NAME, ignore_errors=True)

    def published(self) -> Any:
        """The model without the copy."""
        base: Any = super()
        model = base.published()
        drop_adapter(model)
        return model
