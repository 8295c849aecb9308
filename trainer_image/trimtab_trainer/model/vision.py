"""Models that see: their processor, how many tokens an image becomes, and which of their modules are the eyes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel


def sees(folder: Path) -> bool:
    """Whether the model in a folder takes images."""
    return "vision_config" in _described(folder)


def model_type(folder: Path) -> str:
    """transformers' name of the kind of model in a folder."""
    return str(_described(folder).get("model_type"))


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def see_sight(local: LocalModel, field: str) -> None:
    """Raise Fault(ModelInvalid) when a model beside the tuned one takes no images, and the rows show some."""
    if not sees(local.path):
        problem = f"{field} {local.reference}: the rows show images and the model has no vision"
        raise Fault(Reason.MODEL_INVALID, problem, "Name a model that sees.")


def load_processor(folder: Path, tokenizer: Any, field: str) -> Any:
    """The processor of a model with vision, around the tokenizer that the run uses.

    Raises Fault(ModelInvalid) when it does not open or has no placeholder for an image.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "Publish preprocessor_config.json and its kin with the model."
        raise Fault(Reason.MODEL_INVALID, f"{field}: the image processor does not open: {first}", hint) from error
    if getattr(processor, "image_token", None) is None or getattr(processor, "image_processor", None) is None:
        raise Fault(Reason.MODEL_INVALID, f"{field}: the processor knows no placeholder for an image")
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


def placeholder(processor: Any) -> int:
    """The token that stands for an image until it is prepared."""
    token: Any = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return int(token)


def placeholders(processor: Any) -> list[int]:
    """The tokens that stand for images and videos."""
    known = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    return [int(processor.tokenizer.convert_tokens_to_ids(token)) for token in known if token is not None]


def lengths(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that images of these heights and widths become."""
    found: Any = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])
    return [int(each) for each in found["num_image_tokens"]]


def resized(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a model of the Qwen-VL kind sees of an image of this height and width."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images = processor.image_processor
    bounds = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    height, width = smart_resize(*size, factor=images.patch_size * images.merge_size, **bounds)
    return height, width


def eyes(model: Any) -> list[str]:
    """Names of the modules that make tokens of images: vision towers with their projections into the language model.

    They are found by the configuration that they were built from and, for projections that have none, by where they
    stand: beside the tower and the language model, within the module that holds both.
    """
    vision, text = model.config.vision_config, model.config.get_text_config()
    towers: list[str] = []
    languages: list[str] = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is vision and not any(name.startswith(f"{tower}.") for tower in towers):
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
    """Leave what makes tokens of images as it is."""
    for name in eyes(model):
        model.get_submodule(name).requires_grad_(False)
