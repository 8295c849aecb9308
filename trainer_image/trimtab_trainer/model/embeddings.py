"""Embeddings and head of a model: their names, and room for tokens that it has not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

SHORTHANDS = ("embeddings", "head")
"""Names that stand for a model's own in tuner.lora.modulesToSave."""


def input_name(model: Any) -> str:
    """The last part of the name of the embeddings: embed_tokens, wte."""
    return _name_of(model, model.get_input_embeddings())


def output_name(model: Any) -> str:
    """The last part of the name of the head: lm_head."""
    return _name_of(model, model.get_output_embeddings())


def has_own_head(model: Any) -> bool:
    """Whether the head has a matrix of its own, not that of the embeddings."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def module_name(model: Any, name: str) -> str:
    """A module as peft wants it named: the shorthands become the model's own names."""
    if name not in SHORTHANDS:
        return name
    return input_name(model) if name == "embeddings" else output_name(model)


def extend(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Give a tokenizer special tokens; returns their ids, in order.

    Raises Fault(SpecInvalid) for one that it has as a special token already.
    """
    from tokenizers import AddedToken

    known = set(tokenizer.all_special_tokens)
    for index, token in enumerate(tokens):
        if token in known:
            raise Fault(
                Reason.SPEC_INVALID,
                f"model.newTokens[{index}]: the tokenizer has the special token {token!r} already",
                "Leave it out.",
            )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return [int(each) for each in tokenizer.convert_tokens_to_ids(list(tokens))]


def make_room(model: Any, tokenizer: Any, new: Sequence[int], whole: bool) -> None:
    """See that each new token has a row in embeddings and head, begun as the mean of the others.

    `whole`: all weights are tuned, so that the matrices may grow; an adapter must fit the base as it is.
    Raises Fault(SpecInvalid) when an adapter's base has too few rows.
    """
    import torch

    if not new:
        return
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        if not whole:
            raise Fault(
                Reason.SPEC_INVALID,
                f"model.newTokens: {len(tokenizer)} tokens do not fit the {rows} rows of the base's embeddings",
                "Set tuner.type: full, which lets the embeddings grow, or tune a base that has room.",
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    known = min(rows, min(new))
    ends = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    matrices = {id(each.weight): each.weight for each in ends}
    with torch.no_grad():
        for weight in matrices.values():
            weight[list(new)] = weight[:known].float().mean(dim=0).to(weight.dtype)


def _name_of(model: Any, wanted: Any) -> str:
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    if wanted is None or name is None:
        raise Fault(
            Reason.SPEC_INVALID,
            "tuner.lora.modulesToSave: the model has no such part",
            "Name its modules as the architecture does.",
        )
    return str(name).rsplit(".", 1)[-1]
