"""An existing model, opened for tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import vision
from trimtab_trainer.strategies.gathering import length


def refuse_adapter(folder: Path, field: str, reference: str) -> None:
    """Raise Fault(ModelInvalid) when what lies there is an adapter, not a model."""
    if (folder / "adapter_config.json").is_file():
        hint = "Fold it into its base with a MergeJob, and start from that."
        raise Fault(Reason.MODEL_INVALID, f"{field} {reference} is an adapter, not a whole model", hint)


def architecture(folder: Path, field: str, reference: str) -> dict[str, Any]:
    """config.json of a model. Raises Fault(ModelInvalid) when it is not there or names no architecture."""
    refuse_adapter(folder, field, reference)
    path = folder / "config.json"
    if not path.is_file():
        raise Fault(
            Reason.MODEL_INVALID, f"{field} {reference}: no config.json there", "Point to a transformers folder."
        )
    try:
        config = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise Fault(Reason.MODEL_INVALID, f"{field} {reference}: config.json is not JSON: {error.msg}") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise Fault(Reason.MODEL_INVALID, f"{field} {reference}: config.json names no model_type")
    return config


def load(local: LocalModel, field: str, dtype: Any, **how: Any) -> Any:
    """The model with its weights in `dtype`. `how`: further keywords of from_pretrained.

    Raises Fault(ModelInvalid) when it does not open or its weights do not fill its architecture.
    """
    kind = _opener(local.path)
    architecture(local.path, field, local.reference)
    try:
        opened: Any = kind.from_pretrained(
            local.path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Fault(Reason.MODEL_INVALID, f"{field} {local.reference} does not open: {first}") from error
    model, info = opened
    if missing := sorted(info["missing_keys"]):
        named = ", ".join(missing[:3])
        raise Fault(
            Reason.MODEL_INVALID, f"{field} {local.reference}: {len(missing)} weights are missing, first {named}"
        )
    return model


def _opener(folder: Path) -> Any:
    """The class of transformers that opens the model in a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    senses = vision.senses(folder)
    if "image" in senses:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM if senses else AutoModelForCausalLM


def see_vocabulary(model: Any, tokenizer: Any, field: str) -> None:
    """Raise Fault(ModelInvalid) when the tokenizer has tokens that the model has no embedding for."""
    rows = length(model.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field}: the tokenizer has {len(tokenizer)} tokens, the model has embeddings for {rows}",
            "Publish the model with the tokenizer that it was trained with.",
        )


def see_same_vocabulary(folder: Path, other: Path, field: str, reference: str) -> None:
    """Raise Fault(ModelInvalid) when the model in `other`, which `field` names, numbers its tokens in another way."""
    import tokenizers

    ours, theirs = (
        tokenizers.Tokenizer.from_file(str(each / "tokenizer.json")).get_vocab() for each in (folder, other)
    )
    if ours != theirs:
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field} {reference}: its tokenizer is another than the tuned model's ({len(theirs)} tokens, {len(ours)})",
            "Name a model that was made from the same base.",
        )
