"""What is written, in which order and into which file: all of it decided before the first byte is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch

from trimtab_trainer.merge.architecture import Architecture, Conversion, Group, Names
from trimtab_trainer.merge.checkpoint import SINGLE, Checkpoint
from trimtab_trainer.merge.tensorfile import TensorInfo, build_header
from trimtab_trainer.merge.update import Arithmetic, Change, cast, is_transposed

_PIECE = 1 << 20
"""Bytes of the base that are changed at a time; some of them wait to be written."""

Piece: TypeAlias = memoryview | torch.Tensor
"""Some of a tensor's bytes."""


class Unit(Protocol):
    """Tensors of the merged model that are made together, from tensors of the base."""

    @property
    def outputs(self) -> list[TensorInfo]:
        """What is written."""
        ...

    @property
    def sources(self) -> list[TensorInfo]:
        """What is read."""
        ...

    def produce(self, base: Checkpoint) -> Iterator[tuple[int, Piece]]:
        """The bytes of the outputs, each with the output's number, in order."""
        ...


@dataclass
class Plain:
    """One tensor: copied, cast, or changed."""

    source: TensorInfo
    output: TensorInfo
    parameter: str
    """Name at run time."""
    changes: Sequence[Change] = ()

    @property
    def outputs(self) -> list[TensorInfo]:
        """See Unit."""
        return [self.output]

    @property
    def sources(self) -> list[TensorInfo]:
        """See Unit."""
        return [self.source]

    def produce(self, base: Checkpoint) -> Iterator[tuple[int, Piece]]:
        """See Unit."""
        if not self.changes and self.source.dtype == self.output.dtype:
            yield from ((0, piece) for piece in base.pieces(self.source))
            return
        arithmetic = Arithmetic(self.parameter, self.changes) if self.changes else None
        for first, last in self._blocks():
            rows = base.rows(self.source, first, last)
            if arithmetic is None:
                yield 0, cast(rows, self.output.dtype, self.source.name)
            else:
                where = {"plane": first} if len(self.source.shape) == 3 else {"row": first}
                yield 0, arithmetic.apply(rows, self.output.dtype, **where)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        shape = self.source.shape
        whole = len(shape) < 2 or is_transposed(self.changes)
        height = max(
            1, shape[0] if whole and shape else _PIECE * (shape[0] if shape else 1) // max(1, self.source.size)
        )
        for first in range(0, shape[0] if shape else 1, height):
            yield first, min(first + height, shape[0] if shape else 1)


@dataclass
class Converted:
    """Tensors that are one parameter at run time: brought there, changed, and brought back."""

    group: Group
    architecture: Architecture
    changes: Mapping[str, Sequence[Change]]
    by_pattern: dict[str, list[TensorInfo]]
    dtype: torch.dtype
    plane: int = 0
    """Number of the first plane (expert) that this unit has."""
    sources: list[TensorInfo] = field(init=False)
    outputs: list[TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = [info for infos in self.by_pattern.values() for info in infos]
        self.outputs = [replace(info, dtype=self.dtype) for info in self.sources]

    def produce(self, base: Checkpoint) -> Iterator[tuple[int, Piece]]:
        """See Unit."""
        conversion = Conversion(self.architecture, self.group)
        tensors = {pattern: [base.read(info) for info in infos] for pattern, infos in self.by_pattern.items()}
        parameters = conversion.to_runtime(tensors)
        for name in parameters:
            if self.changes.get(name):
                arithmetic = Arithmetic(name, self.changes[name])
                parameters[name] = arithmetic.apply(parameters[name], self.dtype, plane=self.plane)
            else:
                parameters[name] = cast(parameters[name], self.dtype, name)
        made = conversion.to_disk(parameters)
        number = 0
        for pattern, infos in self.by_pattern.items():
            for info, tensor in zip(infos, made[pattern], strict=True):
                yield number, tensor.reshape(info.shape).contiguous()
                number += 1


@dataclass
class Shard:
    """One file of the merged model."""

    name: str
    tensors: list[TensorInfo]
    header: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


@dataclass
class Plan:
    """The units in order, the files, and which output goes where."""

    units: list[Unit]
    shards: list[Shard]
    untied: bool
    """Embedding and head were one and are two now."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for shard in self.shards for tensor in shard.tensors)

    def last_uses(self) -> dict[str, int]:
        """Of each file of the base, the number of the last unit that reads it."""
        return {info.file: number for number, unit in enumerate(self.units) for info in unit.sources}

    def index(self) -> dict[str, object]:
        """model.safetensors.index.json."""
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        return {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(weight_map.items()))}


def plan(
    architecture: Architecture,
    names: Names,
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Sequence[Change]],
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> Plan:
    """Decide everything. `dtype` None keeps each tensor's own; `max_shard_size` is in bytes."""
    chosen = _Types(architecture, dtype)
    units: list[Unit] = []
    seen: set[int] = set()
    for parameter, group in names.groups.items():
        if id(group) not in seen:
            seen.add(id(group))
            units += _units(architecture, group, tensors, changes, chosen, parameter)
    units += [Plain(tensors[name], tensors[name], name) for name in names.strangers]
    partners = _untied(architecture, names, tensors, changes, chosen)
    units += partners.units
    order = {name: number for number, name in enumerate(sorted({info.file for info in tensors.values()}))}
    units.sort(key=lambda unit: min((order[info.file], info.start) for info in unit.sources))
    return Plan(units, _shards(units, max_shard_size), partners.untied)


def place(plan: Plan) -> Iterator[tuple[Unit, list[int]]]:
    """Each unit with the number of the file of each of its outputs."""
    numbers = iter([number for number, shard in enumerate(plan.shards) for _ in shard.tensors])
    for unit in plan.units:
        yield unit, [next(numbers) for _ in unit.outputs]


class _Types:
    """The type of each tensor of the merged model."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype | None):
        self._dtype = dtype
        parts = "|".join(re.escape(part) for part in architecture.kept_in_float32)
        self._kept = re.compile(rf"(^|\.)({parts})(\.|$)") if parts else None

    def of(self, info: TensorInfo, parameter: str) -> torch.dtype:
        if self._dtype is None or not info.dtype.is_floating_point:
            return info.dtype
        kept = self._kept is not None and self._kept.search(parameter) is not None
        return info.dtype if kept else self._dtype


def _units(
    architecture: Architecture,
    group: Group,
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Sequence[Change]],
    types: _Types,
    parameter: str,
) -> list[Unit]:
    touched = any(changes.get(target) for target in group.targets)
    if group.converter is None or not touched:
        infos = [tensors[name] for name in group.names]
        mine = changes.get(parameter, ()) if touched else ()
        return [Plain(info, replace(info, dtype=types.of(info, parameter)), parameter, mine) for info in infos]
    by_pattern = {pattern: [tensors[name] for name in names] for pattern, names in group.sources.items()}
    dtype = types.of(tensors[group.names[0]], parameter)
    count = group.stacked
    if count == 1:
        return [Converted(group, architecture, changes, by_pattern, dtype)]
    return [
        Converted(
            group, architecture, changes, {key: [infos[plane]] for key, infos in by_pattern.items()}, dtype, plane
        )
        for plane in range(count)
    ]


@dataclass
class _Partners:
    units: list[Unit]
    untied: bool


def _untied(
    architecture: Architecture,
    names: Names,
    tensors: Mapping[str, TensorInfo],
    changes: Mapping[str, Sequence[Change]],
    types: _Types,
) -> _Partners:
    """What must be written besides, when one of two tied parameters was tuned: they are two from now on."""
    partners = _Partners([], untied=False)
    for name, other in architecture.tied.items():
        if not changes.get(name) and not changes.get(other):
            continue
        partners.untied = True
        for absent in (each for each in (name, other) if each not in names.groups):
            info = tensors[names.group_of(absent).names[0]]
            output = replace(info, name=names.on_disk(absent), dtype=types.of(info, absent))
            partners.units.append(Plain(info, output, absent, changes.get(absent, ())))
    return partners


def _shards(units: Sequence[Unit], max_shard_size: int) -> list[Shard]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for output in (output for unit in units for output in unit.outputs):
        if groups[-1] and size + output.size > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.size
    shards = []
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, starts = build_header(group)
        placed = [replace(tensor, file=name, start=start) for tensor, start in zip(group, starts, strict=True)]
        shards.append(Shard(name, placed, header))
    return shards
