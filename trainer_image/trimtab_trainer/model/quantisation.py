"""Weights in few bits: quantised as they are loaded, or found quantised in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.model import Quantization
from trimtab_trainer.endings import Fault

COMPILED = "its kernels (gptqmodel) are published as source alone and need a CUDA compiler"
NOT_OPENED = {
    "gptq": COMPILED,
    "awq": COMPILED,
    "aqlm": "the image does not hold its kernels (aqlm), which were not proven under LoRA",
    "eetq": "its kernels are fetched from a hub at run time, or come for another Python",
    "hqq": "transformers no longer opens it",
}
"""Why a checkpoint that is quantised so is not opened; docs/quantisation.md says more."""


def method(described: dict[str, Any]) -> str | None:
    """How a checkpoint is quantised, by its config.json: bnb4, bnb8, another method's own name, or None."""
    found = described.get("quantization_config")
    if not isinstance(found, dict):
        return None
    name = str(found.get("quant_method", "")).lower()
    if name in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        return "bnb8" if found.get("load_in_8bit") else "bnb4"
    return name or "unknown"


def see_trainable(described: dict[str, Any], config: RunConfig, field: str, reference: str) -> None:
    """Raise Fault(ModelInvalid or SpecInvalid) for a quantised model that this run cannot tune."""
    found = method(described)
    if found is None:
        return
    if found not in ("bnb4", "bnb8"):
        reason = NOT_OPENED.get(found, "it has no backward pass here")
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field} {reference} is quantised with {found}: {reason}",
            "Start from the model as it was before it was quantised, and set model.quantization.",
        )
    if config.spec.model.quantization is not None:
        raise Fault(
            Reason.SPEC_INVALID,
            f"model.quantization: {field} {reference} is already quantised with {found}",
            "Leave model.quantization out.",
        )
    if config.resolved.tuner_type == "full":
        raise Fault(
            Reason.SPEC_INVALID,
            f"tuner.type: {field} {reference} is quantised with {found}, and quantised weights cannot move",
            "Set tuner.type: lora, or start from the model as it was before it was quantised.",
        )
    storage = described["quantization_config"].get("bnb_4bit_quant_storage", "uint8")
    if config.resolved.strategy in ("fsdp2", "zero3") and (found == "bnb8" or storage != "bfloat16"):
        raise Fault(
            Reason.SPEC_INVALID,
            f"distributed.strategy: {config.resolved.strategy} cannot split {field} {reference}, which is "
            f"quantised with {found} and stored as {storage}",
            "Choose ddp, zero1 or zero2, or start from the model as it was and set model.quantization.",
        )


def settings(quantization: Quantization, arithmetic: str, split: bool, whole: Sequence[str] = ()) -> Any:
    """The spec in the words of transformers. `arithmetic`: what the run computes in; `split`: weights are split.

    `whole`: names of modules that are not quantised; by default the language head is not.
    """
    import torch
    from transformers import BitsAndBytesConfig

    # It tells at each multiplication of 8 bit that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization.method == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(whole) or None)
    compute = arithmetic if quantization.compute_dtype == "auto" else quantization.compute_dtype
    storage = quantization.storage_dtype
    if storage == "auto":
        storage = "bfloat16" if split else "uint8"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(whole) or None,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        bnb_4bit_quant_storage=getattr(torch, storage),
    )


def keep_layout(model: Any) -> None:
    """Keep bitsandbytes from laying quantised weights out anew when it first evaluates on a CPU.

    Some of its CPUs would: the layout is for inference, asks for widths that are multiples of 32, and is not what the
    quantisation state of a split weight describes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
