"""Which weights of an opened model move: the room between loading and learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab_api import inputs
from trimtab_api.contract import RunConfig
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import adapter, beneath, freezing
from trimtab_trainer.model.beneath import Term
from trimtab_trainer.model.heads import head_of

Kept = Callable[[Callable[[], dict[str, Any]]], Path]
"""Makes the start of an adapter once for all processes and attempts: from tensors to the folder that holds them."""


@dataclass(frozen=True)
class Tuned:
    """A model that is ready to learn."""

    model: Any
    terms: Sequence[Term] = field(default_factory=tuple)
    """What the base has taken in; publishing gives it to the adapter."""


def tune(
    model: Any,
    config: RunConfig,
    base: LocalModel | None,
    further: Mapping[str, LocalModel],
    new_tokens: Sequence[int],
    kept: Kept,
) -> Tuned:
    """Wrap the model with its adapter, or freeze what full tuning leaves alone.

    Raises Fault for an adapter that does not fit, and for names that nothing in the model has.
    """
    spec = config.spec
    if config.resolved.tuner_type == "full":
        if spec.tuner.freeze is not None:
            freezing.freeze(model, spec.tuner.freeze)
        return Tuned(model)
    assert base is not None, "an adapter has a base"
    if spec.tuner.continue_from is not None:
        wrapped = adapter.go_on(model, further[inputs.CONTINUED], base, inputs.CONTINUED)
        adapter.see_head(wrapped, inputs.CONTINUED)
        return Tuned(wrapped)
    lora, terms = adapter.settings(spec), []
    for number in range(len(spec.tuner.adapters or ())):
        name = inputs.lower_adapter(number)
        adapter.see_base(further[name], base, name)
        terms.append(beneath.lower(further[name], name))
        beneath.take_in(model, terms[-1], name)
    wrapped = adapter.adapt(model, lora, spec.training.seed, new_tokens, head_of(spec).task)
    adapter.see_head(wrapped, "tuner.lora")
    beneath.see_covered(beneath.adapted_modules(wrapped), terms)
    if adapter.takes_out(lora):
        terms.append(_start(wrapped, config, kept))
    beneath.see_room(lora.rank, terms)
    return Tuned(wrapped, tuple(terms))


def _start(wrapped: Any, config: RunConfig, kept: Kept) -> Term:
    from safetensors.torch import load_file

    lora = adapter.settings(config.spec)
    folder = kept(lambda: beneath.start(wrapped, lora))
    return beneath.begin_at(wrapped, load_file(folder / adapter.WEIGHTS))
