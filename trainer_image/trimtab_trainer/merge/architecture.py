"""The model's shape without its weights, and how names on disk and at run time belong together.

transformers renames, splits and stacks tensors while it loads (Mixtral's experts, for one). An adapter speaks of the
names at run time, the files of those on disk: transformers' own conversion mapping leads from one to the other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.tensorfile import TensorInfo


@dataclass
class Group:
    """Tensors on disk that become parameters at run time together."""

    first: str
    """Name at run time; of several, the first."""
    sources: dict[str, list[str]]
    """Names on disk by the pattern of the converter that took them; without a converter one list of one name."""
    converter: WeightConverter | None = None

    @property
    def names(self) -> list[str]:
        """Names on disk."""
        return [name for names in self.sources.values() for name in names]

    @property
    def targets(self) -> list[str]:
        """Names at run time."""
        if self.converter is None:
            return [self.first]
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern) for pattern in patterns]

    @property
    def stacked(self) -> int:
        """How many independent planes (experts) the group stacks; 1 when it must be converted as a whole."""
        if self.converter is None:
            return 1
        head, *rest = self.converter.operations
        lengths = {len(names) for names in self.sources.values()}
        alone = len(self.targets) == 1 and len(lengths) == 1 and isinstance(head, MergeModulelist) and head.dim == 0
        return lengths.pop() if alone and all(_leaves_planes(operation) for operation in rest) else 1


def _leaves_planes(operation: Any) -> bool:
    if isinstance(operation, Concatenate):
        return operation.dim != 0 and operation.num_shards_attribute is None
    return isinstance(operation, Transpose) and 0 not in (operation.dim0, operation.dim1) and not operation.check_dims


@dataclass
class Architecture:
    """What config.json says."""

    document: dict[str, Any]
    """config.json."""
    config: Any
    factory: Callable[..., Any]
    """The class of the model."""
    model: Any = field(init=False)
    """The model with its buffers, and parameters that have shapes only."""
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    """The shape of each parameter and persistent buffer at run time."""

    def __post_init__(self) -> None:
        self.model = self.empty()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def empty(self) -> Any:
        """Another such model, in evaluation mode; parameters are float32 on the meta device."""
        with init_empty_weights(include_buffers=False):
            return self.factory(copy.deepcopy(self.config), dtype=torch.float32).eval()

    @property
    def tied(self) -> dict[str, str]:
        """Parameters at run time that are one with another: name → the other's."""
        return dict(self.model.all_tied_weights_keys or {})

    @property
    def kept_in_float32(self) -> tuple[str, ...]:
        """Parts of names whose parameters stay in float32 in whatever type the model is."""
        lists = (self.model._keep_in_fp32_modules, self.model._keep_in_fp32_modules_strict)
        return tuple(sorted({part for parts in lists for part in parts or ()}))


def read_architecture(content: bytes, where: str) -> Architecture:
    """The architecture that a config.json names.

    Raises Fault(ModelInvalid) for one that transformers does not have, and for quantised weights.
    """
    try:
        document: dict[str, Any] = json.loads(content)
        model_type, names = str(document["model_type"]), document["architectures"]
    except (ValueError, KeyError, TypeError) as error:
        hint = "Publish the model with the config.json that transformers writes."
        raise Fault(Reason.MODEL_INVALID, f"{where} config.json names no model_type or architectures", hint) from error
    if document.get("quantization_config"):
        method = document["quantization_config"].get("quant_method", "unknown")
        hint = "Set base to the full-precision model that it was quantised from."
        raise Fault(Reason.MODEL_INVALID, f"{where} is quantised ({method}); an update cannot be folded into it", hint)
    factory = getattr(transformers, str(names[0]), None) if names else None
    if factory is None or model_type not in CONFIG_MAPPING:
        problem = (
            f"{where} is a {names} of type {model_type}, which transformers {transformers.__version__} does not have"
        )
        hint = "Models of transformers itself can be merged; others would run code that comes with the model."
        raise Fault(Reason.MODEL_INVALID, problem, hint)
    return Architecture(document, CONFIG_MAPPING[model_type].from_dict(document), factory._from_config)


class Names:
    """The names of one checkpoint and what they are at run time."""

    def __init__(self, architecture: Architecture, tensors: Mapping[str, TensorInfo]):
        self._architecture = architecture
        self._transforms = get_model_conversion_mapping(architecture.model)
        self.groups: dict[str, Group] = {}
        """By each name at run time."""
        self.strangers: list[str] = []
        """Names on disk that the model has no use for."""
        by_first = self._grouped(tensors)
        for group in by_first.values():
            for target in group.targets:
                self.groups[target] = group
        self._check(tensors)

    def group_of(self, name: str) -> Group:
        """Where a parameter comes from; a tied one may come from its partner."""
        return self.groups[self.source_of(name)]

    def source_of(self, name: str) -> str:
        """The name at run time that the files hold for this parameter: its own, or that of what it is tied to."""
        if name in self.groups:
            return name
        tied = self._architecture.tied
        partners = [tied.get(name), *(each for each, other in tied.items() if other in (name, tied.get(name)))]
        return next(each for each in partners if each is not None and each in self.groups)

    def on_disk(self, name: str) -> str:
        """How a parameter that the files do not hold (a tied one) would be called in them."""
        backwards = [transform.reverse_transform() for transform in self._used(WeightRenaming)[::-1]]
        return str(rename_source_key(name, backwards, [], reverse=True)[0])

    def _grouped(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Group]:
        shapes: dict[str, Any] = self._architecture.shapes
        prefix = self._architecture.model.base_model_prefix
        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        groups: dict[str, Group] = {}
        for name in sorted(tensors, key=dot_natural_key):
            found, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
            if found not in shapes and name in shapes:
                found, pattern = name, None
            if found not in shapes:
                self.strangers.append(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            group = groups.setdefault(found, Group(found, {}, converter))
            group.sources.setdefault(pattern or "", []).append(name)
        return groups

    def _used(self, kind: Any) -> list[Any]:
        return [each for each in self._transforms if isinstance(each, kind) and each.was_used()]

    def _check(self, tensors: Mapping[str, TensorInfo]) -> None:
        parameters = {name for name, _ in self._architecture.model.named_parameters(remove_duplicate=False)}
        tied = self._architecture.tied
        partners = {*tied, *tied.values()}
        missing = sorted(parameters - set(self.groups) - partners)
        missing += [name for name, other in tied.items() if name not in self.groups and other not in self.groups]
        if missing:
            raise Fault(Reason.MODEL_INVALID, f"the base has no tensor for {_few(missing)}", "Publish the base again.")
        for name, group in self.groups.items():
            if group.converter is not None:
                continue
            found, wanted = tensors[group.names[0]].shape, self._architecture.shapes[name]
            if found != wanted:
                problem = f"tensor {group.names[0]} of the base is {list(found)}, its config.json wants {list(wanted)}"
                raise Fault(Reason.MODEL_INVALID, problem, "Publish the base again.")


class Conversion:
    """A converter's way from disk to run time and back, over some planes of its group or all of it."""

    def __init__(self, architecture: Architecture, group: Group):
        assert group.converter is not None
        self._architecture = architecture
        self._group = group
        self._there = group.converter
        try:
            self._back = group.converter.reverse_transform()
        except NotImplementedError as error:
            hint = "Save the model with the installed transformers first; it then stands in its form at run time."
            raise Fault(
                Reason.MODEL_INVALID, f"{group.first} cannot be written back in the form of the base", hint
            ) from error

    def to_runtime(self, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Parameters by name from tensors by source pattern."""
        found = self._run(self._there, dict(tensors))
        patterns = self._there.target_patterns
        return {self._group.first.replace(patterns[0], pattern): tensor for pattern, tensor in found.items()}

    def to_disk(self, parameters: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Tensors by source pattern, as to_runtime took them."""
        named = dict(zip(self._back.source_patterns, self._group.targets, strict=True))
        found = self._run(self._back, {pattern: [parameters[name]] for pattern, name in named.items()})
        tensors: dict[str, list[torch.Tensor]] = {}
        for source, target in zip(self._there.source_patterns, self._back.target_patterns, strict=True):
            numbered = [
                found[name] for name in (target.replace("*", str(i)) for i in range(len(found))) if name in found
            ]
            tensors[source] = numbered[: 1 if "*" not in target else None]
        return tensors

    def _run(self, transform: Any, tensors: Any) -> dict[str, torch.Tensor]:
        for operation in transform.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=transform.source_patterns,
                target_patterns=transform.target_patterns,
                full_layer_name=self._group.first,
                model=self._architecture.model,
                config=self._architecture.config,
                missing_keys=None,
            )
        return {name: found[0] if isinstance(found, list) else found for name, found in tensors.items()}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
