"""What lies between the base as it is published and the adapter that is trained on it.

PiSSA and OLoRA take their first factors out of the base; an adapter may stand on others that the base took in. Either
way the weights that an adapter learns on are nobody else's: W + Σ sᵢ·BᵢAᵢ. What is published therefore adds these terms
to the adapter, so that it belongs to the original W: [B | (s₁/s)·B₁ | …] · [A; A₁; …], with scale s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.tuner import Lora
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import adapter

_PREFIX = "base_model.model."
LARGEST_RANK = 512
"""Of an artifact, as its status can say."""


@dataclass(frozen=True)
class Term:
    """A low-rank update that the base has taken in."""

    factors: Mapping[str, tuple[Any, Any]]
    """A [rank, in] and B [out, rank] by the name of the module in the base."""
    scale: float
    """Signed: negative for factors that were taken out."""

    @property
    def rank(self) -> int:
        """Of every module's factors."""
        return max(int(first.shape[0]) for first, _ in self.factors.values())


def lower(source: LocalModel, field: str) -> Term:
    """An adapter as something that a base can take in.

    Raises Fault(ModelInvalid) for one that is more than low-rank updates of linear layers.
    """
    from safetensors.torch import load_file

    config = adapter.read(source, field)
    beyond = [
        name
        for name in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "alpha_pattern")
        if config.get(name)
    ]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if beyond:
        hint = "Fold it into the base with a MergeJob, and start from that."
        raise Fault(Reason.MODEL_INVALID, f"{field} {source.reference} uses {', '.join(beyond)}", hint)
    factors = _pairs(load_file(source.path / adapter.WEIGHTS))
    return Term(factors, _scale(config))


def take_in(base: Any, term: Term, field: str) -> None:
    """Add a term to the weights of a model. Raises Fault(BaseMismatch) when a module is missing or of another shape."""
    _add(base, term, 1.0, field)


def give_back(base: Any, term: Term) -> None:
    """Undo take_in, up to the rounding of the weights' type."""
    _add(base, term, -1.0, "start")


def start(model: Any, lora: Lora) -> dict[str, Any]:
    """The factors that PiSSA or OLoRA begin with, as an adapter's tensors; base and adapter stay as they are.

    `model` is wrapped with a fresh adapter. One layer at a time is taken apart, in float32, by peft.
    """
    tensors: dict[str, Any] = {}
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        whole = weight.data.clone()
        fresh = (layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data)
        if lora.init_weights == "olora":
            # peft takes every weight for [out, in]; GPT-2's are [in, out].
            layer.get_base_layer().weight.data = whole.T.clone() if layer.fan_in_fan_out else whole.clone()
            layer.olora_init("default")
        else:
            layer.pissa_init("default", lora.init_weights)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A["default"].weight.data.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B["default"].weight.data.contiguous()
        layer.get_base_layer().weight.data = whole
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = fresh
    return tensors


def begin_at(model: Any, tensors: Mapping[str, Any]) -> Term:
    """Let the adapter of `model` begin with these factors, and take them out of the base."""
    import torch

    factors = _pairs(tensors)
    scale = 0.0
    for name, layer in _layers(model):
        first, second = factors[name]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(first)
            layer.lora_B["default"].weight.copy_(second)
        scale = float(layer.scaling["default"])
    term = Term(factors, -scale)
    take_in(model.get_base_model(), term, "tuner.lora.initWeights")
    return term


def publish(folder: Path, terms: Sequence[Term]) -> None:
    """Rewrite a saved adapter so that it belongs to the base before it took the terms in.

    Raises Fault(SpecInvalid) when a term changes a module that the adapter does not.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / adapter.CONFIG).read_text())
    scale, tensors = _scale(config), load_file(folder / adapter.WEIGHTS)
    pairs = _pairs(tensors)
    see_covered(pairs, terms)
    for name, (first, second) in pairs.items():
        firsts, seconds = [first], [second]
        for term in terms:
            nothing = (first.new_zeros(term.rank, first.shape[1]), second.new_zeros(second.shape[0], term.rank))
            a, b = term.factors.get(name, nothing)
            firsts.append(a.to(first.dtype))
            seconds.append((b * (term.scale / scale)).to(second.dtype))
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.cat(firsts, dim=0).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.cat(seconds, dim=1).contiguous()
    rank = int(config["r"]) + sum(term.rank for term in terms)
    config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "init_lora_weights": True}
    save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})
    (folder / adapter.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def see_covered(adapted: Mapping[str, Any], terms: Sequence[Term]) -> None:
    """Raise Fault(SpecInvalid) when the terms change what the adapter does not, or would make too large a rank."""
    changed = {name for term in terms for name in term.factors}
    if beyond := sorted(changed - set(adapted)):
        hint = "Leave tuner.lora.targetModules out, or name there all that the lower adapters change."
        raise Fault(Reason.SPEC_INVALID, f"tuner.adapters change {beyond[0]}, which tuner.lora does not", hint)


def see_room(rank: int, terms: Sequence[Term]) -> None:
    """Raise Fault(SpecInvalid) when the published rank would be larger than an artifact's may be."""
    whole = rank + sum(term.rank for term in terms)
    if whole > LARGEST_RANK:
        hint = "Lower tuner.lora.rank, or fold the lower adapters into the base with a MergeJob."
        raise Fault(Reason.SPEC_INVALID, f"the adapters' ranks are {whole} together, more than {LARGEST_RANK}", hint)


def adapted_modules(model: Any) -> dict[str, Any]:
    """The linear layers of a wrapped model that its adapter changes, by name in the base."""
    return dict(_layers(model))


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora.layer import Linear

    for name, module in model.named_modules():
        if isinstance(module, Linear) and "default" in module.lora_A:
            yield name.removeprefix(_PREFIX), module


def _add(base: Any, term: Term, sign: float, field: str) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, (first, second) in term.factors.items():
        layer = _layer(base, name, field)
        update = second.float() @ first.float()
        update = update.T if isinstance(layer, Conv1D) else update
        if layer.weight.shape != update.shape:
            raise _unfit(name, field)
        with torch.no_grad():
            changed = layer.weight.float() + sign * term.scale * update.to(layer.weight.device)
            layer.weight.copy_(changed.to(layer.weight.dtype))


def _layer(base: Any, name: str, field: str) -> Any:
    try:
        module = base.get_submodule(name)
    except AttributeError as error:
        raise _unfit(name, field) from error
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _unfit(name: str, field: str) -> Fault:
    return Fault(
        Reason.BASE_MISMATCH,
        f"{field}: the base has no layer {name} of that shape",
        "Name the base that the adapter was trained on.",
    )


def _pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    end = ".lora_A.weight"
    names = [key.removeprefix(_PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    return {
        name: (tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]) for name in names
    }


def _scale(config: Mapping[str, Any]) -> float:
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
