"""A low-rank adapter on a model, by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.tuner import Lora
from trimtab_trainer.endings import Fault


def settings(spec: FineTuneJobSpec) -> Lora:
    """The adapter that the spec asks for, or the defaults."""
    return spec.tuner.lora or Lora()


def adapt(model: Any, lora: Lora, seed: int) -> Any:
    """The model wrapped with a fresh adapter; only the adapter is trainable.

    Raises Fault(SpecInvalid) when no module has one of the wanted names.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    target: str | list[str] = lora.target_regex or lora.target_modules or "all-linear"
    if target == ["all-linear"]:
        target = "all-linear"
    # peft declares a whole alpha; fractions work and are saved.
    alpha: Any = lora.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=target,
        use_rslora=lora.rs_lora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        init_lora_weights="gaussian" if lora.init_weights == "gaussian" else True,
    )
    set_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        hint = "Correct tuner.lora.targetModules or targetRegex; leave both out for every linear layer."
        raise Fault(Reason.SPEC_INVALID, f"tuner.lora: {first}", hint) from error


def name_base(folder: Path, reference: str) -> None:
    """Write the logical base into adapter_config.json, in place of this pod's path."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = reference
    config["task_type"] = "CAUSAL_LM"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
