"""The check at the end: base and adapters together must answer as the merged model does.

Both run in float32 from what is in storage. A plain matrix is there a block of rows at a time, while it is multiplied
with; what else a layer has is there while the layer computes. So the check needs a few megabytes, or the memory of a
layer's experts, whatever the size of the model, and sees what was really written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge import memory
from trimtab_trainer.merge.adapter import Adapter, overlay
from trimtab_trainer.merge.architecture import Architecture, Conversion, Names
from trimtab_trainer.merge.checkpoint import Checkpoint
from trimtab_trainer.merge.update import BLOCK, Arithmetic, Change, LowRank, as_float32, is_transposed

log = logging.getLogger(__name__)

_SEQUENCES = 2
_LENGTH = 24
"""Tokens of the sample, drawn with a fixed seed."""
_ROUNDINGS = 24
"""Default tolerance: this many roundings of the merged type, each relative to the spread of the logits."""
_FLOAT32_FLOOR = 2e-5
"""Smallest relative tolerance: what the order of float32 sums makes of equal weights."""

_SCRATCH = 3
"""The buffer of blocks; the arithmetic has those before it."""


class Values(Protocol):
    """The float32 values of parameters, by their names at run time."""

    def whole(self, name: str) -> torch.Tensor:
        """The parameter."""
        ...

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Its rows in turn, each block with the number of its first row: use it before the next is taken."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What the check saw."""

    method: str
    """peft: the adapters run unmerged through PEFT; weights: base plus update in float32, with the reason."""
    difference: float
    """Largest difference of logits."""
    tolerance: float
    """What was allowed."""
    spread: float
    """Standard deviation of the logits."""

    def document(self) -> dict[str, Any]:
        """For args.json."""
        return {
            "method": self.method,
            "maxDifference": round(self.difference, 9),
            "tolerance": round(self.tolerance, 9),
            "logitsSpread": round(self.spread, 9),
            "tokens": _SEQUENCES * _LENGTH,
        }


class Stored:
    """The parameters of a checkpoint."""

    def __init__(self, architecture: Architecture, checkpoint: Checkpoint):
        self.names = Names(architecture, checkpoint.tensors)
        self._architecture = architecture
        self._checkpoint = checkpoint
        self._latest: dict[str, torch.Tensor] = {}

    def whole(self, name: str) -> torch.Tensor:
        """See Values."""
        source = self.names.source_of(name)
        group = self.names.groups[source]
        if group.converter is None:
            return self._checkpoint.read(self._checkpoint.tensors[group.names[0]]).float()
        # Of one group several parameters may come, wanted one after the other.
        if source not in self._latest:
            tensors = {
                pattern: [self._checkpoint.read(self._checkpoint.tensors[each]) for each in names]
                for pattern, names in group.sources.items()
            }
            self._latest = Conversion(self._architecture, group).to_runtime(tensors)
        return self._latest.pop(source).float()

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """See Values."""
        group = self.names.group_of(name)
        info = self._checkpoint.tensors[group.names[0]]
        if group.converter is not None or len(info.shape) != 2:
            yield 0, self.whole(name)
            return
        rows, columns = info.shape
        height = max(1, BLOCK // max(1, columns))
        for first in range(0, rows, height):
            yield first, as_float32(_SCRATCH, self._checkpoint.rows(info, first, min(first + height, rows)))


class Changed:
    """The parameters of a checkpoint after the changes, in float32."""

    def __init__(self, base: Values, changes: Mapping[str, Sequence[Change]]):
        self._base = base
        self._changes = changes

    def whole(self, name: str) -> torch.Tensor:
        """See Values."""
        base = self._base.whole(name)
        changes = self._changes.get(name)
        return Arithmetic(name, changes).apply(base, torch.float32) if changes else base

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """See Values."""
        changes = self._changes.get(name)
        if not changes:
            yield from self._base.blocks(name)
        elif is_transposed(changes):
            yield 0, self.whole(name)
        else:
            arithmetic = Arithmetic(name, changes)
            for first, rows in self._base.blocks(name):
                yield first, arithmetic.apply(rows, torch.float32, row=first)


def verify(
    architecture: Architecture,
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    changes: Mapping[str, Sequence[Change]],
    merged_architecture: Architecture,
    merged: Checkpoint,
    tolerance: float | None,
) -> Verdict:
    """Compare logits. `tolerance` None takes what the merged type's rounding explains.

    Raises Fault(AssertionFailed) when they differ by more, or are not numbers.
    """
    memory.release()
    tokens = _tokens(architecture)
    reason = _not_through_peft(adapters, changes)
    stored = Stored(architecture, base)
    with torch.inference_mode():
        if reason is None:
            wanted = _logits(_unmerged(architecture, adapters), stored, tokens)
        else:
            wanted = _logits(architecture.empty(), Changed(stored, changes), tokens)
        base.rest()
        found = _logits(merged_architecture.empty(), Stored(merged_architecture, merged), tokens)
    verdict = _compare(wanted, found, merged, tolerance, "peft" if reason is None else f"weights: {reason}")
    log.info("logits differ by %.3g of %.3g allowed (%s)", verdict.difference, verdict.tolerance, verdict.method)
    return verdict


def _compare(
    wanted: torch.Tensor, found: torch.Tensor, merged: Checkpoint, given: float | None, method: str
) -> Verdict:
    spread = float(wanted.std())
    dtypes = {info.dtype for info in merged.tensors.values() if info.dtype.is_floating_point}
    rounding = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    tolerance = given if given is not None else spread * max(_ROUNDINGS * rounding, _FLOAT32_FLOOR)
    # A sequence at a time, for the memory; a maximum of torch keeps what is no number.
    largest = [(one - other).abs().max() for one, other in zip(wanted, found, strict=True)]
    difference = float(torch.stack(largest).max())
    verdict = Verdict(method, difference, tolerance, spread)
    if not math.isfinite(difference) or difference > tolerance:
        problem = (
            f"merged logits differ from those of base and adapters by {difference:.4g}, allowed are {tolerance:.4g}"
        )
        hint = (
            "Keep the base's dtype, or accept the difference by verify.tolerance; in float32 it is a fault of Trimtab."
        )
        raise Fault(Reason.ASSERTION_FAILED, f"{problem} (their spread is {spread:.4g})", hint)
    return verdict


def _not_through_peft(adapters: Sequence[tuple[Adapter, float]], changes: Mapping[str, Sequence[Change]]) -> str | None:
    """Why PEFT cannot run these adapters together, unmerged; None when it can."""
    every = [change for each in changes.values() for change in each]
    plain = all(isinstance(operation, LowRank) for change in every for operation in change.operations)
    if len(adapters) > 1 and not plain:
        return "several adapters of which some are more than plain low rank"
    if any(weight != 1 for _, weight in adapters) and not plain:
        return "a weight on an adapter that is more than plain low rank"
    return None


def _unmerged(architecture: Architecture, adapters: Sequence[tuple[Adapter, float]]) -> nn.Module:
    laid = overlay(architecture, [adapter for adapter, _ in adapters])
    tuner: Any = laid.base_model
    tuner.set_adapter([f"adapter{number}" for number in range(len(adapters))])
    for parameter in laid.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.float()
    for module in laid.modules():
        scaling = getattr(module, "scaling", {}) if isinstance(module, BaseTunerLayer) else {}
        for number, (_, weight) in enumerate(adapters):
            if f"adapter{number}" in scaling:
                scaling[f"adapter{number}"] *= weight
    model: nn.Module = tuner.model
    return model


def _tokens(architecture: Architecture) -> torch.Tensor:
    """A sample that every run draws alike, without the tokens that stand for pictures and sounds."""
    text = architecture.config.get_text_config()
    size = int(getattr(text, "vocab_size", 0))
    if size < 2:
        raise _not_runnable("its configuration has no vocabulary")
    document = {**architecture.document, **text.to_dict()}
    special = {
        value
        for key, value in document.items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usable = torch.tensor([token for token in range(size) if token not in special])
    drawn = torch.randint(len(usable), (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0))
    return usable[drawn]


def _logits(model: nn.Module, values: Values, tokens: torch.Tensor) -> torch.Tensor:
    try:
        return _run(model, values, tokens, _streamable(model))
    except (RuntimeError, TypeError, AttributeError) as error:
        # A model that reaches into its matrices by itself must have them whole.
        log.info("the check takes whole layers (%s: %s)", type(error).__name__, error)
    try:
        return _run(model, values, tokens, {})
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise _not_runnable(f"{type(error).__name__}: {error}") from error


def _run(model: nn.Module, values: Values, tokens: torch.Tensor, streamed: Mapping[nn.Module, str]) -> torch.Tensor:
    """The logits, with the weights lent. Raises what the model raises."""
    paths = {module: path for path, module in model.named_modules()}
    withheld = [
        (module, key, parameter)
        for module in paths
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    handles: list[Any] = []
    try:
        for module, path in streamed.items():
            module.forward = _streaming(module, path, values)
        handles += [handle for unit in _layers(model) for handle in _lend(unit, paths, values, streamed)]
        # A product with a matrix that has no content was seen to give whatever stood in memory, and no error.
        for module, key, _ in withheld:
            del module._parameters[key]
        outcome: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        for module in streamed:
            # An attribute of the module hides the method of its class.
            module.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()
        for module, key, parameter in withheld:
            module._parameters[key] = parameter
    return outcome.float()


def _streamable(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose matrix can come a block of rows at a time, by their paths: nobody else looks at it."""
    whole = {id(child) for module in model.modules() if _needs_whole(module) for child in module.modules()}
    return {
        module: path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.is_meta and id(module) not in whole
    }


def _needs_whole(module: nn.Module) -> bool:
    """What PEFT put here computes with the matrix of the module within."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return True
    return isinstance(module, BaseTunerLayer) and not (
        type(module) in (lora.Linear, lora.Embedding) and not module.lora_variant
    )


def _streaming(module: nn.Module, path: str, values: Values) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a linear layer or an embedding that never has its whole matrix."""
    name = _base_name(f"{path}.weight")
    bias = module._parameters.get("bias")

    def linear(sample: torch.Tensor) -> torch.Tensor:
        outcome = sample.new_empty((*sample.shape[:-1], module.out_features))
        for first, rows in values.blocks(name):
            outcome[..., first : first + len(rows)] = functional.linear(sample, rows)
        if bias is None:
            return outcome
        return outcome.add_(values.whole(_base_name(f"{path}.bias")) if bias.is_meta else bias)

    def embedding(numbers: torch.Tensor) -> torch.Tensor:
        outcome = torch.empty((*numbers.shape, module.embedding_dim))
        for first, rows in values.blocks(name):
            here = (numbers >= first) & (numbers < first + len(rows))
            outcome[here] = rows[numbers[here] - first]
        return outcome

    return linear if isinstance(module, nn.Linear) else embedding


def _lend(
    unit: nn.Module, paths: Mapping[nn.Module, str], values: Values, streamed: Mapping[nn.Module, str]
) -> list[Any]:
    """Give a module its weights when it begins and take them away when it has ended."""
    places = [
        (module, key, f"{paths[module]}.{key}".removeprefix("."))
        for module in unit.modules()
        if module not in streamed
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]

    def begin(*_: object) -> None:
        for module, key, path in places:
            if not _idle(path):
                module._parameters[key] = nn.Parameter(values.whole(_base_name(path)), requires_grad=False)

    def end(*_: object) -> None:
        for module, key, _path in places:
            module._parameters.pop(key, None)

    return [unit.register_forward_pre_hook(begin), unit.register_forward_hook(end, always_call=True)]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that are run one after the other: each layer of a list, and what stands outside of lists."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        whole = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if whole or any(True for _ in module.parameters(recurse=False)):
            yield module
        elif isinstance(module, nn.ModuleList):
            yield from module
        else:
            for child in module.children():
                yield from walk(child)

    return walk(model)


def _base_name(path: str) -> str:
    return path.replace(".base_layer", "").replace(".token_adapter", "").replace(".original_module", "")


def _idle(path: str) -> bool:
    """What PEFT put aside, because an adapter brought all of it."""
    return ".original_module." in path


def _not_runnable(why: str) -> Fault:
    hint = "Set verify.enabled to false to publish without the check."
    return Fault(
        Reason.MODEL_INVALID, f"the logits cannot be compared: the model does not run on tokens alone ({why})", hint
    )
