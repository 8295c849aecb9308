"""Which models' sequences several processes can share, by config.json. Without torch: the preflight looks as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

KINDS = {"full_attention", "sliding_attention"}
"""Layers that look from one token at another by attention alone."""


def see_shareable(described: Mapping[str, Any], size: int, length: int) -> None:
    """Raise Fault(ModelInvalid) for a model whose sequences `size` processes cannot share.

    `length`: of the longest sequence, in tokens. Attention is exchanged without a mask, so each token must look at all
    before it.
    """
    if "vision_config" in described or "audio_config" in described:
        raise not_shareable("it sees or hears, and what it is shown is not spread over the tokens")
    text = described.get("text_config") or described
    heads = text.get("num_attention_heads") or text.get("n_head")
    keys = text.get("num_key_value_heads") or heads
    for name, number in (("attention heads", heads), ("key heads", keys)):
        if not isinstance(number, int) or number % size:
            raise not_shareable(f"its {number} {name} are no multiple of {size}")
    if others := sorted(set(text.get("layer_types") or ()) - KINDS):
        raise not_shareable(f"it has layers of {', '.join(others)}, which carry more than attention along the tokens")
    sliding = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    window = min((each for each in (sliding, text.get("attention_chunk_size")) if each is not None), default=length)
    if window < length:
        raise not_shareable(f"its attention ends after {window} tokens, and dataset.maxLength is {length}")


def not_shareable(why: str) -> Fault:
    """Why the sequences of a model cannot be shared."""
    return Fault(
        Reason.MODEL_INVALID,
        f"distributed.parallel.sequence does not go with this model: {why}",
        "Set distributed.parallel.sequence: 1, or tune another model.",
    )
