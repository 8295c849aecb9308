"""The arithmetic: what an adapter does to one parameter, block of rows by block of rows, in float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge import memory

BLOCK = 1 << 18
"""Elements of a block: small enough to stay in the processor's caches between the steps."""

Step = Callable[[torch.Tensor, int, int, int], None]
"""(block, plane, first row, last row): changes the float32 block in place."""


class Operation(Protocol):
    """One step of an adapter's change of a parameter, seen as planes of rows of columns."""

    @property
    def transposed(self) -> bool:
        """The rows of this operation are the columns of the parameter as it is stored."""
        ...

    def prepare(self, transposed: bool) -> Step:
        """The step over the parameter (or its transpose), with its factors made ready for many blocks."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + scaling · left · right (Hu et al. 2021, arXiv:2106.09685)."""

    left: torch.Tensor
    """rows x rank."""
    right: torch.Tensor
    """rank x columns."""
    scaling: float
    transposed: bool = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""
        left, right = (self.left, self.right) if transposed == self.transposed else (self.right.T, self.left.T)
        left, right = left.float(), right.float()

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            block.addmm_(left[first:last], right, alpha=self.scaling)

        return step


@dataclass(frozen=True)
class Directed:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): the low-rank sum, each row brought to a learnt length."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor
    """Length of each row."""
    transposed: bool = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""
        assert transposed == self.transposed, "a row's length needs the whole row"
        moved = LowRank(self.left, self.right, self.scaling).prepare(transposed=False)
        magnitude = self.magnitude.float().reshape(-1, 1)

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            moved(block, plane, first, last)
            block.mul_(magnitude[first:last] / torch.linalg.vector_norm(block, dim=1, keepdim=True))

        return step


@dataclass(frozen=True)
class Experts:
    """A low-rank sum for each plane of a parameter that stacks experts."""

    left: torch.Tensor
    """experts x rows x rank."""
    right: torch.Tensor
    """experts x rank x columns."""
    scaling: float
    transposed: ClassVar[bool] = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            block.addmm_(self.left[plane, first:last].float(), self.right[plane].float(), alpha=self.scaling)

        return step


@dataclass(frozen=True)
class Added:
    """W + delta, for what has no cheaper form (convolutions, biases)."""

    delta: torch.Tensor
    """In the parameter's shape."""
    transposed: ClassVar[bool] = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""
        planes = as_planes(self.delta, transposed)

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            block.add_(planes[plane, first:last])

        return step


@dataclass(frozen=True)
class Replaced:
    """The parameter was trained as a whole."""

    tensor: torch.Tensor
    transposed: ClassVar[bool] = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""
        planes = as_planes(self.tensor, transposed)

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            block.copy_(planes[plane, first:last])

        return step


@dataclass(frozen=True)
class RowsReplaced:
    """Some rows (tokens) were trained as a whole."""

    rows: torch.Tensor
    """Their numbers."""
    tensor: torch.Tensor
    """Their values."""
    transposed: ClassVar[bool] = False

    def prepare(self, transposed: bool) -> Step:
        """See Operation."""

        def step(block: torch.Tensor, plane: int, first: int, last: int) -> None:
            if transposed:
                block.index_copy_(1, self.rows, self.tensor.T[first:last].float())
                return
            here = (self.rows >= first) & (self.rows < last)
            block.index_copy_(0, self.rows[here] - first, self.tensor[here].float())

        return step


@dataclass(frozen=True)
class Change:
    """What one adapter does to one parameter: its operations in turn, the outcome weighted."""

    operations: tuple[Operation, ...]
    weight: float = 1.0


def as_planes(tensor: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A view as planes x rows x columns: a vector is one row, a matrix one plane, a kernel rows of the rest."""
    if tensor.dim() <= 1:
        return tensor.reshape(1, 1, -1)
    if tensor.dim() == 2:
        return (tensor.T if transposed else tensor).unsqueeze(0)
    return tensor if tensor.dim() == 3 else tensor.reshape(1, tensor.shape[0], -1)


def is_transposed(changes: Sequence[Change]) -> bool:
    """Whether the rows of these changes are the parameter's columns, so that it cannot be taken in rows."""
    return any(operation.transposed for change in changes for operation in change.operations)


class Arithmetic:
    """The changes of one parameter, made ready."""

    def __init__(self, name: str, changes: Sequence[Change]):
        self.name = name
        self.transposed = is_transposed(changes)
        self._chains = [
            (change.weight, [each.prepare(self.transposed) for each in change.operations]) for change in changes
        ]

    def apply(self, base: torch.Tensor, dtype: torch.dtype, plane: int = 0, row: int = 0) -> torch.Tensor:
        """The changed parameter (or the rows and planes of it that begin at `row` and `plane`) in `dtype`.

        Raises Fault(AssertionFailed) for a result that is not finite.
        """
        outcome = memory.empty(tuple(base.shape), dtype)
        sources, targets = as_planes(base, self.transposed), as_planes(outcome, self.transposed)
        for index, first, last in _blocks(sources):
            source, target = sources[index, first:last], targets[index, first:last]
            target.copy_(self._changed(source, plane + index, row + first, row + last))
            if not is_finite(target):
                raise self._not_finite(dtype)
        return outcome

    def _changed(self, source: torch.Tensor, plane: int, first: int, last: int) -> torch.Tensor:
        block = as_float32(0, source)
        if len(self._chains) == 1 and self._chains[0][0] == 1:
            _run(self._chains[0][1], block, plane, first, last)
            return block
        # Every change starts from the base: their differences from it add up.
        for weight, steps in self._chains:
            changed, base = as_float32(1, source), as_float32(2, source)
            _run(steps, changed, plane, first, last)
            block.add_(changed.sub_(base), alpha=weight)
        return block

    def _not_finite(self, dtype: torch.dtype) -> Fault:
        hint = "Use another dtype if it is float16; else the adapter or its base is broken."
        return Fault(Reason.ASSERTION_FAILED, f"the merged {self.name} is not finite in {dtype}", hint)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is a number."""
    # A sum is much quicker than a look at each; only when it overflows must each be looked at.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(tensor).all())


_BUFFERS: dict[int, torch.Tensor] = {}


def as_float32(number: int, source: torch.Tensor) -> torch.Tensor:
    """The source in float32, in a buffer that the next block takes again: fresh memory costs more than the sums."""
    if number not in _BUFFERS or _BUFFERS[number].numel() < source.numel():
        # One made for inference could not be written into outside of it.
        with torch.inference_mode(mode=False):
            _BUFFERS[number] = torch.empty(source.numel())
    return _BUFFERS[number][: source.numel()].view(source.shape).copy_(source)


def cast(base: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another type. Raises Fault(AssertionFailed) when that cannot hold its values."""
    outcome = base.to(dtype)
    if outcome.is_floating_point() and not is_finite(outcome) and is_finite(base):
        raise Fault(Reason.ASSERTION_FAILED, f"{name} does not fit into {dtype}", "Set dtype to bfloat16 or float32.")
    return outcome


def _run(steps: Sequence[Step], block: torch.Tensor, plane: int, first: int, last: int) -> None:
    for step in steps:
        step(block, plane, first, last)


def _blocks(planes: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    count, rows, columns = planes.shape
    height = max(1, BLOCK // max(1, columns))
    for plane in range(count):
        for first in range(0, rows, height):
            yield plane, first, min(first + height, rows)
