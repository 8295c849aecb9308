"""What an adapter changes, told by PEFT itself: it is laid over a model without weights and asked layer by layer."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import safe_open

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.architecture import Architecture
from trimtab_trainer.merge.places import refuse_pickles
from trimtab_trainer.merge.update import (
    Added,
    Directed,
    Experts,
    LowRank,
    Operation,
    Replaced,
    RowsReplaced,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base as it is. PiSSA, OLoRA and their kin change it, so that the saved factors
belong to a base which nobody has any more."""
_WHOLE_MODEL_ONLY = {
    "SEQ_CLS": "gives scores by a head that its base does not have",
    "TOKEN_CLS": "labels tokens by a head that its base does not have",
    "QUESTION_ANS": "marks answers by a head that its base does not have",
    "FEATURE_EXTRACTION": "gives vectors, and its base has a head that writes",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies in this pod."""

    where: str
    """The field and the logical reference, for messages."""
    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, torch.Tensor]
    """By their names in the file; read from the disk as they are needed."""

    def settings(self) -> LoraConfig:
        """What PEFT needs to lay the adapter over a model, to answer and not to learn."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: LoraConfig = LoraConfig.from_peft_type(**self.config)
        found.inference_mode = True
        found.init_lora_weights = False
        found.lora_dropout = 0.0
        return found


def read_adapter(folder: Path, where: str) -> Adapter:
    """The adapter in a folder.

    Raises Fault: no adapter, pickled, another method than LoRA, or one whose factors belong to a changed base.
    """
    refuse_pickles({path.name: 0 for path in folder.iterdir()}, where)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        missing = CONFIG if not (folder / CONFIG).is_file() else WEIGHTS
        raise Fault(Reason.MODEL_INVALID, f"{where} has no {missing}: it is no adapter", "Point to a PEFT adapter.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (ValueError, OSError) as error:
        raise Fault(Reason.MODEL_INVALID, f"{where} does not open: {error}", "Publish the adapter again.") from error
    _refuse_unsupported(config, where)
    return Adapter(where, config, tensors)


class Overlay(PeftModel):
    """Adapters laid over a model without weights: the base stays empty, the adapters' tensors are put in."""

    where = ""
    """The adapter that is being loaded, for messages."""

    def put(self, adapter: Adapter, name: str) -> None:
        """Load the weights of an adapter whose layers are in place.

        Raises Fault: a key that nothing takes, a tensor of another shape, or one that is missing.
        """
        self.where = adapter.where
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_peft_model_state_dict(self, adapter.tensors, name)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Assign rather than copy, because the layers have shapes only; and let nothing pass unsaid."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        unused = sorted(set(state_dict) - set(wanted))
        if unused:
            problem = f"{self.where}: {len(unused)} tensors fit nothing in the base, the first is {unused[0]}"
            hint = "Name the base that the adapter was trained on, or publish the adapter again."
            raise Fault(Reason.BASE_MISMATCH, problem, hint)
        for name, tensor in state_dict.items():
            if tuple(tensor.shape) != wanted[name]:
                problem = f"{self.where}: {name} is {list(tensor.shape)}, the base wants {list(wanted[name])}"
                raise Fault(Reason.BASE_MISMATCH, problem, "Name the base that the adapter was trained on.")
        return super().load_state_dict(state_dict, strict=False, assign=True)


def overlay(architecture: Architecture, adapters: list[Adapter]) -> Overlay:
    """The adapters over a model without weights, named adapter0, adapter1, ... Raises Fault as `Overlay.put`."""
    laid: Overlay | None = None
    for index, adapter in enumerate(adapters):
        name = f"adapter{index}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if laid is None:
                    laid = Overlay(architecture.empty(), adapter.settings(), name, low_cpu_mem_usage=True)
                else:
                    laid.add_adapter(name, adapter.settings(), low_cpu_mem_usage=True)
        except (ValueError, TypeError) as error:
            # PEFT found no layer of the wanted names, or of a kind that it can tune.
            hint = "Name the base that the adapter was trained on."
            raise Fault(Reason.BASE_MISMATCH, f"{adapter.where} does not fit the base: {error}", hint) from error
        laid.put(adapter, name)
    assert laid is not None
    _refuse_incomplete(laid, adapters)
    laid.eval()
    return laid


def operations(architecture: Architecture, adapter: Adapter) -> dict[str, tuple[Operation, ...]]:
    """What the adapter does to each parameter, by its name at run time.

    Raises Fault as `overlay` does, and for kinds of layers that cannot be merged.
    """
    laid = overlay(architecture, [adapter])
    model: Any = laid.base_model.model
    found: dict[str, list[Operation]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and ".lora_" not in name and not _within_wrapper(name):
            found.setdefault(_plain(name), []).append(Replaced(parameter.detach()))
    for path, module in model.named_modules():
        for name, operation in _of_module(_plain(path), module, adapter.where):
            found.setdefault(name, []).append(operation)
    unknown = sorted(set(found) - set(architecture.shapes))
    if unknown:
        raise Fault(Reason.BASE_MISMATCH, f"{adapter.where} changes {unknown[0]}, which the base does not have")
    return {name: tuple(each) for name, each in found.items()}


def _of_module(path: str, module: Any, where: str) -> Iterator[tuple[str, Operation]]:
    name = "adapter0"
    if isinstance(module, ModulesToSaveWrapper):
        for part, parameter in module.modules_to_save[name].named_parameters():
            yield f"{path}.{part}", Replaced(parameter.detach())
    elif isinstance(module, TrainableTokensWrapper):
        yield from _tokens(path, module, name)
    elif isinstance(module, BaseTunerLayer) and isinstance(module, lora.LoraLayer):
        yield from _of_layer(path, module, name, where)


def _tokens(path: str, module: Any, name: str) -> Iterator[tuple[str, Operation]]:
    holder = module.token_adapter.tied_adapter or module.token_adapter
    rows = torch.tensor(holder.token_indices[name])
    yield f"{path}.weight", RowsReplaced(rows, holder.trainable_tokens_delta[name].detach())


def _of_layer(path: str, layer: Any, name: str, where: str) -> Iterator[tuple[str, Operation]]:
    if name not in layer.lora_A and name not in layer.lora_embedding_A:
        return
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, DoraLinearVariant | DoraEmbeddingVariant):
        raise _unmergeable(where, path, type(variant).__name__)
    scaling = float(layer.scaling[name])
    if isinstance(layer, lora.ParamWrapper):
        yield f"{path}.{layer.parameter_name}", _stacked(layer, name, scaling)
    elif isinstance(layer, lora.Linear):
        left, right = _factors(layer, name)
        yield f"{path}.weight", _matrix(layer, name, left, right, scaling, layer.fan_in_fan_out)
    elif isinstance(layer, lora.Embedding):
        left, right = layer.lora_embedding_B[name].detach(), layer.lora_embedding_A[name].detach()
        if variant is None:
            yield f"{path}.weight", LowRank(right.T, left.T, scaling)
        else:
            yield f"{path}.weight", _matrix(layer, name, left, right, scaling, transposed=True)
    elif isinstance(layer, lora._ConvNd) and variant is None:
        yield f"{path}.weight", Added(layer.get_delta_weight(name).detach())
    else:
        raise _unmergeable(where, path, type(layer).__name__)
    if layer.lora_bias.get(name):
        yield f"{path}.bias", Added(layer.lora_B[name].bias.detach().float() * scaling)


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()


def _matrix(
    layer: Any, name: str, left: torch.Tensor, right: torch.Tensor, scaling: float, transposed: bool
) -> Operation:
    if layer.lora_variant.get(name) is None:
        return LowRank(left, right, scaling, transposed)
    return Directed(left, right, scaling, layer.lora_magnitude_vector[name].weight.detach(), transposed)


def _stacked(layer: Any, name: str, scaling: float) -> Operation:
    if layer.num_experts == 1:
        return LowRank(*_factors(layer, name), scaling)
    left, right, _ = layer.get_delta_factors(name)
    return Experts(left.detach(), right.detach(), scaling)


def _plain(path: str) -> str:
    """A path in the overlaid model without what PEFT put into it."""
    return re.sub(r"\.(base_layer|token_adapter)(?=\.|$)", "", path)


def _within_wrapper(name: str) -> bool:
    return ".modules_to_save." in name or ".trainable_tokens_" in name


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        problem = f"{where} is a {config.get('peft_type')} adapter; LoRA and DoRA can be merged"
        raise Fault(Reason.MODEL_INVALID, problem, "Serve it unmerged, or train a LoRA.")
    if config.get("task_type") in _WHOLE_MODEL_ONLY:
        task = config["task_type"]
        hint = "Merge adapters of language models; for a whole model of this kind train with tuner.type: full."
        raise Fault(Reason.MODEL_INVALID, f"{where} is for {task}: it {_WHOLE_MODEL_ONLY[task]}", hint)
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_INITS:
        problem = f"{where} began with init_lora_weights {start}, which changes its base: it fits no other"
        hint = "Convert it to plain LoRA (PEFT: path_initial_model_for_weight_conversion) and publish it again."
        raise Fault(Reason.MODEL_INVALID, problem, hint)
    for key in ("layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            raise Fault(Reason.MODEL_INVALID, f"{where} uses {key}, which cannot be merged", "Serve it unmerged.")


def _refuse_incomplete(laid: Overlay, adapters: list[Adapter]) -> None:
    for name, parameter in laid.named_parameters():
        mine = re.search(r"\.adapter(\d+)(\.|$)", name)
        if parameter.is_meta and mine is not None:
            where = adapters[int(mine.group(1))].where
            raise Fault(Reason.MODEL_INVALID, f"{where} lacks the tensor for {name}", "Publish the adapter again.")


def _unmergeable(where: str, path: str, kind: str) -> Fault:
    return Fault(
        Reason.MODEL_INVALID, f"{where}: layer {path} is a {kind}, which cannot be merged", "Serve it unmerged."
    )
