"""A model with random weights, in any architecture that transformers knows."""

from __future__ import annotations

import json
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.model import Scratch
from trimtab_trainer.endings import Fault
from trimtab_trainer.model.heads import Head, LanguageHead, ScalarHead
from trimtab_trainer.model.opening import prepare

FIELD = "model.scratch"
TIED_UP_TO = 2048
"""Widest model whose embeddings are shared with the head by default."""


def configuration(scratch: Scratch, tokenizer: Any, stops: list[int]) -> Any:
    """The architecture's configuration: sizes from the spec, vocabulary and special tokens from the tokenizer.

    Raises Fault(SpecInvalid) for an unknown architecture, keys that it refuses, or sizes that it does not take.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if scratch.model_type not in CONFIG_MAPPING:
        raise Fault(
            Reason.SPEC_INVALID, f"{FIELD}.modelType: transformers knows no {scratch.model_type!r}", "Try llama."
        )
    kind = CONFIG_MAPPING[scratch.model_type]
    wanted = _sizes(scratch) | _tokens(tokenizer)
    keys = {kind.attribute_map.get(key, key): value for key, value in {**wanted, **_extra(scratch)}.items()}
    text_kind = getattr(kind, "sub_configs", {}).get("text_config")
    if text_kind is not None:
        keys = {"text_config": {text_kind.attribute_map.get(key, key): value for key, value in keys.items()}}
    try:
        made = kind(**keys)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Fault(Reason.SPEC_INVALID, f"{FIELD}: {scratch.model_type} refuses the configuration: {first}") from error
    _see_taken(made, scratch)
    for part in {id(made): made, id(made.get_text_config()): made.get_text_config()}.values():
        for key, value in _tokens(tokenizer).items():
            setattr(part, key, value)
        part.eos_token_id = tokenizer.eos_token_id if len(stops) == 1 else stops
    return made


def build(scratch: Scratch, tokenizer: Any, stops: list[int], seed: int, head: Head | None = None) -> Any:
    """The model, its weights drawn with `seed`, in float32; by default a language model.

    Raises Fault(SpecInvalid) when the architecture has no such model.
    """
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
        set_seed,
    )

    config = configuration(scratch, tokenizer, stops)
    if isinstance(head, ScalarHead):
        config.num_labels, config.problem_type = head.size, head.problem_type
    kind, said = {
        "CAUSAL_LM": (AutoModelForCausalLM, "causal language model"),
        "SEQ_CLS": (AutoModelForSequenceClassification, "model with a scalar head"),
        "FEATURE_EXTRACTION": (AutoModel, "backbone"),
    }[(head or LanguageHead()).task]
    set_seed(seed)
    try:
        model = kind.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Fault(Reason.SPEC_INVALID, f"{FIELD}: {scratch.model_type} makes no {said}: {first}") from error
    if head is not None and not isinstance(head, LanguageHead):
        return prepare(model, head)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _sizes(scratch: Scratch) -> dict[str, Any]:
    hidden = scratch.hidden_size
    tied = scratch.tie_embeddings if scratch.tie_embeddings is not None else hidden <= TIED_UP_TO
    return {
        "hidden_size": hidden,
        "intermediate_size": scratch.intermediate_size or -(-hidden * 8 // 3 // 16) * 16,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.attention_heads,
        "num_key_value_heads": scratch.key_value_heads or scratch.attention_heads,
        "head_dim": hidden // scratch.attention_heads,
        "max_position_embeddings": scratch.max_length,
        "tie_word_embeddings": tied,
    }


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _extra(scratch: Scratch) -> dict[str, Any]:
    if scratch.extra is None:
        return {}
    try:
        extra = json.loads(scratch.extra)
    except json.JSONDecodeError as error:
        raise Fault(Reason.SPEC_INVALID, f"{FIELD}.extra: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(extra, dict):
        raise Fault(Reason.SPEC_INVALID, f"{FIELD}.extra: must be a JSON object")
    return extra


def _see_taken(config: Any, scratch: Scratch) -> None:
    """A family that names a size differently would silently keep its own default of billions of weights."""
    text = config.get_text_config()
    for name, value in (("hidden_size", scratch.hidden_size), ("num_hidden_layers", scratch.layers)):
        if getattr(text, name, None) != value:
            hint = "Give the family's own name for it in model.scratch.extra, or choose another modelType."
            raise Fault(Reason.SPEC_INVALID, f"{FIELD}: {scratch.model_type} does not take {name} {value}", hint)
