"""Folder in, folder out: the weights of a model in fewer bits, by llm-compressor."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.mergejob import Quantize
from trimtab_trainer.endings import Fault

ALWAYS_KEPT = (
    "lm_head",
    r"re:.*embed_tokens$",
    r"re:.*\.gate$",
    r"re:.*router.*",
    r"re:.*(visual|vision_tower|vision_model|multi_modal_projector).*",
)
"""Modules that lose much and save little: the head, routers of experts, vision towers. gate_proj is no router."""
GROUP = 128
_CALIBRATED = ("gptq", "awq")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "manifest.json")


def quantise(folder: Path, into: Path, wanted: Quantize, rows: Sequence[list[int]], tokenizer: Any) -> None:
    """Write the quantised model of `folder` to `into`, with everything else that lay there.

    `rows` are token ids for the calibrated schemes. Raises Fault(SpecInvalid) when a layer does not divide into groups.
    """
    _see_groups(folder, wanted)
    kept = [*ALWAYS_KEPT, *wanted.keep]
    # Its log is a file in the working directory unless told otherwise.
    os.environ["LLM_COMPRESSOR_LOG_FILE_DISABLED"] = "true"
    if wanted.scheme in _CALIBRATED:
        _calibrated(folder, into, wanted, kept, rows, tokenizer)
    else:
        _rounded(folder, into, wanted, kept)
    for name in ("recipe.yaml", "manifest.json"):
        (into / name).unlink(missing_ok=True)


def _rounded(folder: Path, into: Path, wanted: Quantize, kept: list[str]) -> None:
    from llmcompressor import model_free_ptq

    scheme: Any = {"fp8": "FP8_DYNAMIC", "int8": "W8A8"}.get(wanted.scheme) or _four_bits(wanted)
    model_free_ptq(folder, into, scheme=scheme, ignore=kept)


def _calibrated(
    folder: Path, into: Path, wanted: Quantize, kept: list[str], rows: Sequence[list[int]], tokenizer: Any
) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        _pin_nothing()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=_modifiers(wanted, kept),
        max_seq_length=wanted.max_length,
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(into, save_compressed=True, max_shard_size="4GB")
    for name in _companions(folder, into):
        shutil.copyfile(folder / name, into / name)


def _modifiers(wanted: Quantize, kept: list[str]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = {"group_0": _four_bits(wanted)}
    if wanted.scheme == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=kept)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=kept)]


def _four_bits(wanted: Quantize) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=wanted.scheme != "awq",
        strategy="group",
        group_size=wanted.group_size or GROUP,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _pin_nothing() -> None:
    """llm-compressor pins memory for copies to a device that is not there; torch then asks for a driver and fails."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None


def _see_groups(folder: Path, wanted: Quantize) -> None:
    if wanted.scheme in ("fp8", "int8"):
        return
    size = wanted.group_size or GROUP
    for name, shape in _layers(folder, [*ALWAYS_KEPT, *wanted.keep]):
        if shape[1] % size:
            raise Fault(
                Reason.SPEC_INVALID,
                f"quantize.groupSize {size} does not divide the width {shape[1]} of {name}",
                "Set quantize.groupSize to 32 or 64, name the module in quantize.keep, or take scheme int8 or fp8.",
            )


def _layers(folder: Path, kept: list[str]) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each weight that a scheme changes."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                module = key.removesuffix(".weight")
                shape = file.get_slice(key).get_shape()
                if key != module and len(shape) == 2 and not any(_names(each, module) for each in kept):
                    yield module, shape


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern or module.endswith(f".{pattern}")


def _companions(folder: Path, into: Path) -> list[str]:
    """What belongs to the model besides weights and what was written already."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [
        name
        for name in names
        if not any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS) and not (into / name).exists()
    ]


def quantised_size(folder: Path) -> int:
    """Bytes of all weights of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def method_of(folder: Path) -> str | None:
    """How a folder's weights are quantised already; None for a plain model."""
    found: Any = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else None
