"""Full tuning of a part: which parameters stay as they are."""

from __future__ import annotations

import re
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.tuner import Freeze
from trimtab_trainer.endings import Fault

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")


def freeze(model: Any, asked: Freeze) -> None:
    """Take the gradients from what the spec names.

    Raises Fault(SpecInvalid) for an expression that does not compile or names nothing, or when nothing would move.
    """
    frozen = _expression(asked.regex, "regex")
    thawed = _expression(asked.trainable_regex, "trainableRegex")
    named = list(model.named_parameters())
    # trainableRegex alone names all that moves.
    only = thawed is not None and not (asked.embeddings or asked.layers or asked.ratio or asked.regex)
    shared = {id(model.get_input_embeddings().weight)} if asked.embeddings else set()
    blocks = _blocks(named, asked)
    for expression, field in ((frozen, "regex"), (thawed, "trainableRegex")):
        if expression is not None and not any(expression.match(name) for name, _ in named):
            raise Fault(
                Reason.SPEC_INVALID,
                f"tuner.freeze.{field}: no parameter is named so; the first one is {named[0][0]}",
                "Correct the expression: it is matched from the beginning of the full name.",
            )
    for name, weight in named:
        still = only or id(weight) in shared or (frozen is not None and bool(frozen.match(name)))
        block = _BLOCK.search(name)
        still = still or (block is not None and int(block.group(1)) < blocks)
        if thawed is not None and thawed.match(name):
            still = False
        weight.requires_grad_(not still)
    if not any(weight.requires_grad for _, weight in named):
        raise Fault(Reason.SPEC_INVALID, "tuner.freeze: no parameter would move", "Freeze less.")


def _blocks(named: list[tuple[str, Any]], asked: Freeze) -> int:
    """How many blocks, from the first, stay."""
    if asked.layers is None and asked.ratio is None:
        return 0
    numbers = [int(found.group(1)) for name, _ in named if (found := _BLOCK.search(name))]
    count = max(numbers, default=-1) + 1
    if asked.layers is not None:
        if asked.layers > count:
            raise Fault(Reason.SPEC_INVALID, f"tuner.freeze.layers: the model has {count} blocks", f"At most {count}.")
        return asked.layers
    return round(count * (asked.ratio or 0))


def _expression(text: str | None, field: str) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise Fault(Reason.SPEC_INVALID, f"tuner.freeze.{field}: not an expression: {error}", "Correct it.") from error
