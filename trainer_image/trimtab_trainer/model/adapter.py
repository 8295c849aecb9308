"""A low-rank adapter on a model, by peft: a fresh one, or one whose training goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.status import TaskType
from trimtab_api.v1alpha1.tuner import Lora
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import embeddings, vision

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DROPOUT = 0.05
"""Dropout of adapters on dense models that say nothing of it."""
TAKEN_OUT = ("pissa", "olora")
"""Beginnings of the starts that take their factors out of the base."""
_ROUTERS = r".*\.(gate|router|shared_expert_gate)"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def settings(spec: FineTuneJobSpec) -> Lora:
    """The adapter that the spec asks for, or the defaults."""
    return spec.tuner.lora or Lora()


def takes_out(lora: Lora) -> bool:
    """Whether the start takes its factors out of the base."""
    return lora.init_weights.startswith(TAKEN_OUT)


def adapt(model: Any, lora: Lora, seed: int, new_tokens: Sequence[int] = (), task: TaskType = "CAUSAL_LM") -> Any:
    """The model wrapped with a fresh adapter; only the adapter is trainable, embeddings of `new_tokens`, a scalar head.

    Raises Fault(SpecInvalid) when no module has one of the wanted names.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    target: str | list[str] = lora.target_regex or lora.target_modules or "all-linear"
    if target == ["all-linear"]:
        target = "all-linear"
    # peft declares a whole alpha; fractions work and are saved.
    alpha: Any = lora.alpha
    saved = [embeddings.module_name(model, name) for name in lora.modules_to_save]
    rows: dict[str, list[int]] | None = None
    if new_tokens:
        rows = {embeddings.input_name(model): list(new_tokens)}
        saved += [embeddings.output_name(model)] if embeddings.has_own_head(model) else []
    try:
        config = LoraConfig(
            task_type=task,
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=dropout(lora, model.config),
            target_modules=target,
            exclude_modules=_left_out(model) if target == "all-linear" else None,
            target_parameters=lora.target_parameters,
            use_rslora=lora.rs_lora,
            use_dora=lora.dora,
            bias="lora_only" if lora.bias == "loraOnly" else lora.bias,
            modules_to_save=list(dict.fromkeys(saved)) or None,
            trainable_token_indices=rows,
            init_lora_weights="gaussian" if lora.init_weights == "gaussian" else True,
        )
        set_seed(seed)
        with warnings.catch_warnings():
            # Tied embeddings and head become two matrices when both are trained in full; a merge writes both.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        hint = (
            "Correct tuner.lora.targetModules, targetRegex or targetParameters; leave them out for every linear layer."
        )
        raise Fault(Reason.SPEC_INVALID, f"tuner.lora: {first}", hint) from error


def see_head(wrapped: Any, field: str) -> None:
    """Raise Fault(SpecInvalid) when the adapter is on the head.

    Losses read the head's weight past it, so as never to hold the logits of a batch. gkd's does not, and there PEFT
    writes the whole head beside the adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(wrapped.get_output_embeddings(), BaseTunerLayer):
        raise Fault(
            Reason.SPEC_INVALID,
            f"{field}: an adapter on the head is not trained, or not published as an adapter",
            "Leave the head out, and name it in tuner.lora.modulesToSave to tune it in full.",
        )


def go_on(model: Any, adapter: LocalModel, base: LocalModel, field: str) -> Any:
    """The model wrapped with an adapter that was trained before; its own settings hold.

    Raises Fault(BaseMismatch) when it was trained on another base, Fault(ModelInvalid) when it does not fit.
    """
    from peft import PeftModel

    see_base(adapter, base, field)
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter.path), is_trainable=True)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        hint = "Name the adapter that was trained on the base of model.from."
        raise Fault(Reason.MODEL_INVALID, f"{field} {adapter.reference} does not fit: {first}", hint) from error
    # peft looks for the base's configuration there whenever it saves; a logical reference would be sought on the hub.
    wrapped.peft_config["default"].base_model_name_or_path = str(base.path)
    return wrapped


def read(adapter: LocalModel, field: str) -> dict[str, Any]:
    """adapter_config.json. Raises Fault(ModelInvalid) when there is none, or it is of another method than LoRA."""
    path = adapter.path / CONFIG
    if not path.is_file():
        hint = "Point to an adapter; a whole model goes into model.from."
        raise Fault(Reason.MODEL_INVALID, f"{field} {adapter.reference}: no {CONFIG} there", hint)
    try:
        config = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise Fault(Reason.MODEL_INVALID, f"{field} {adapter.reference}: {CONFIG} is not JSON: {error.msg}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise Fault(Reason.MODEL_INVALID, f"{field} {adapter.reference} is no LoRA adapter", "Point to a LoRA adapter.")
    if str(config.get("init_lora_weights")).startswith(TAKEN_OUT):
        hint = "Convert it to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        problem = f"{field} {adapter.reference} began with {config['init_lora_weights']}, which changes its base"
        raise Fault(Reason.MODEL_INVALID, problem, hint)
    return config


def see_base(adapter: LocalModel, base: LocalModel, field: str) -> None:
    """Raise Fault when what lies there is no LoRA, or when it says that it was trained on another base."""
    read(adapter, field)
    path = adapter.path / "args.json"
    known = (json.loads(path.read_bytes()).get("base") or {}) if path.is_file() else {}
    if known.get("digest") and base.digest and known["digest"] != base.digest:
        raise Fault(
            Reason.BASE_MISMATCH,
            f"{field} {adapter.reference} was trained on {known.get('uri')} {known['digest'][:19]}…, "
            f"model.from is {base.digest[:19]}…",
            "Name the base that the adapter was trained on.",
        )


def dropout(lora: Lora, config: Any) -> float:
    """As asked for, else 0.05, or 0 where experts share parameters that take none."""
    if lora.dropout is not None:
        return lora.dropout
    return 0.0 if lora.target_parameters or is_mixture(config) else DROPOUT


def is_mixture(config: Any) -> bool:
    """Whether the model is a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, key, None) or 0) > 1 for key in _EXPERTS)


def _left_out(model: Any) -> str | None:
    """What all linear layers are meant without: routers of experts, and what makes tokens of images."""
    patterns = [_ROUTERS] if is_mixture(model.config) else []
    if vision.eyes(model):
        patterns.append(vision.blind_pattern(model))
    return "|".join(patterns) or None


def name_base(folder: Path, reference: str, task: TaskType = "CAUSAL_LM") -> None:
    """Write the logical base into adapter_config.json, in place of this pod's path."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = reference
    config["task_type"] = task
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def rank_of(folder: Path) -> int:
    """The rank that adapter_config.json says."""
    return int(json.loads((folder / CONFIG).read_text())["r"])


def write_tensors(tensors: dict[str, Any], folder: Path) -> None:
    """An adapter's tensors alone, as a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
