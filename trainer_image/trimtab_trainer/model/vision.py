"""Models that see or hear: their processor, and which of their modules are the eyes and ears."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.data.rows import COLUMNS, KINDS, Kind
from trimtab_trainer.endings import Fault

_SENSES: dict[str, tuple[Kind, ...]] = {"vision_config": ("image", "video"), "audio_config": ("audio",)}
"""What a model takes, by the part of its configuration that says so."""
_NAMES: dict[Kind, str] = {"image": "vision", "video": "vision", "audio": "hearing"}


def senses(folder: Path) -> set[Kind]:
    """What the model in a folder takes beside text; none of it for one that reads alone."""
    described = _described(folder)
    return {kind for part, kinds in _SENSES.items() if part in described for kind in kinds}


def see_senses(folder: Path | None, kinds: Iterable[Kind], field: str = "") -> None:
    """Raise Fault(ModelInvalid) when rows show what the model in a folder does not take.

    `field`: who that is, when it is not the tuned model.
    """
    known = set[Kind]() if folder is None else senses(folder)
    for kind in sorted(set(kinds) - known):
        problem = f"{field}the rows show {COLUMNS[kind]} and the model has no {_NAMES[kind]}"
        raise Fault(Reason.MODEL_INVALID, problem, f"Name a model that takes them, or leave {COLUMNS[kind]} out.")


def model_type(folder: Path) -> str:
    """transformers' name of the kind of model in a folder."""
    return str(_described(folder).get("model_type"))


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def load_processor(folder: Path, tokenizer: Any, field: str) -> Any:
    """The processor of a model with senses, around the tokenizer that the run uses.

    Raises Fault(ModelInvalid) when it does not open or has a placeholder for nothing.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "Publish preprocessor_config.json and its kin with the model."
        raise Fault(Reason.MODEL_INVALID, f"{field}: the processor does not open: {first}", hint) from error
    if not any(getattr(processor, f"{kind}_token", None) for kind in KINDS):
        raise Fault(Reason.MODEL_INVALID, f"{field}: the processor has no placeholder for an image, a video or a sound")
    processor.tokenizer = tokenizer
    return processor


def scalar_class(folder: Path, field: str) -> Any:
    """The class of a model that sees and answers with numbers: transformers' own, or its generic head on the backbone.

    Raises Fault(ModelInvalid) when transformers knows no backbone of that kind.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    kind: Any = type(AutoConfig.from_pretrained(folder, local_files_only=True))
    own: Any = AutoModelForSequenceClassification._model_mapping
    if kind in own:
        return own[kind]
    backbones: Any = AutoModel._model_mapping
    if kind not in backbones:
        raise Fault(Reason.MODEL_INVALID, f"{field}: no head of numbers goes on a {kind.model_type} model")
    family = next(
        each
        for each in backbones[kind].__mro__
        if each.__name__.endswith("PreTrainedModel") and each is not PreTrainedModel
    )
    name = family.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, family), {"config_class": kind})


def resized(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a model of the Qwen-VL kind sees of an image of this height and width."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images = processor.image_processor
    bounds = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    height, width = smart_resize(*size, factor=images.patch_size * images.merge_size, **bounds)
    return height, width


def eyes(model: Any) -> list[str]:
    """Names of the modules that make tokens of images and sound: towers with their projections into the language model.

    They are found by the configuration that they were built from and, for projections that have none, by where they
    stand: beside the tower and the language model, within the module that holds both.
    """
    text = model.config.get_text_config()
    built_from = [found for part in _SENSES if (found := getattr(model.config, part, None)) is not None]
    towers: list[str] = []
    languages: list[str] = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if any(config is each for each in built_from) and not any(name.startswith(f"{tower}.") for tower in towers):
            towers.append(name)
        if config is text and not any(name.startswith(f"{language}.") for language in languages):
            languages.append(name)
    holders = {name.rpartition(".")[0] for name in towers}
    beside = [
        f"{holder}.{child}".lstrip(".")
        for holder in holders
        for child, _ in model.get_submodule(holder).named_children()
        if f"{holder}.{child}".lstrip(".") not in (*towers, *languages) and child != "lm_head"
    ]
    return [*towers, *beside]


def blind_pattern(model: Any) -> str:
    """A regular expression over module names that matches all of the eyes and nothing else."""
    return "|".join(rf"(?:.*\.)?{re.escape(name)}(?:\..*)?" for name in eyes(model))


def close_eyes(model: Any) -> None:
    """Leave what makes tokens of images and sound as it is."""
    for name in eyes(model):
        model.get_submodule(name).requires_grad_(False)
