"""This process among the others: who it is, and what all must agree on, over gloo next to whatever moves gradients."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault, fault_of

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A process among the others, by the environment that torchrun sets; alone without it."""

    rank: int
    local_rank: int
    world: int
    local_world: int

    @classmethod
    def here(cls) -> Place:
        """This process."""
        get = os.environ.get
        return cls(
            rank=int(get("RANK", "0")),
            local_rank=int(get("LOCAL_RANK", "0")),
            world=int(get("WORLD_SIZE", "1")),
            local_world=int(get("LOCAL_WORLD_SIZE", "1")),
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    @property
    def first_of_pod(self) -> bool:
        """Whether this is the process that fetches for its pod."""
        return self.local_rank == 0


class Group:
    """All processes of the run. Alone, every agreement is with oneself and costs nothing."""

    def __init__(self, place: Place, expected_world: int, timeout_seconds: int):
        if place.world != expected_world:
            raise Fault(
                Reason.SPEC_INVALID,
                f"WORLD_SIZE is {place.world}, the spec asks for {expected_world} processes",
                "Start the run with the launcher, which hands torchrun the spec's numbers.",
            )
        self.place = place
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._control: Any = None

    def join(self) -> None:
        """Meet the others. Raises torch's DistError when they do not come within the time limit."""
        if self.place.world == 1:
            return
        import torch
        import torch.distributed as dist

        accelerated = torch.cuda.is_available()
        if accelerated:
            torch.cuda.set_device(self.place.local_rank)
        dist.init_process_group("nccl" if accelerated else "gloo", timeout=self._timeout)
        self._control = dist.new_group(backend="gloo", timeout=self._timeout)

    def leave(self) -> None:
        """Part from the others, after a run that ended well."""
        if self._control is not None:
            import torch.distributed as dist

            dist.barrier(group=self._control)
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up anywhere."""
        if self._control is None:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flags.item())

    def total(self, number: int) -> int:
        """The sum over all processes."""
        if self._control is None:
            return number
        import torch
        import torch.distributed as dist

        numbers = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(numbers, group=self._control)
        return int(numbers.item())

    def all_of(self, mine: T) -> list[T]:
        """What each process has, by rank."""
        if self._control is None:
            return [mine]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.place.world
        dist.all_gather_object(gathered, mine, group=self._control)
        return gathered

    def of_first(self, mine: T) -> T:
        """What the first process has."""
        if self._control is None:
            return mine
        import torch.distributed as dist

        box = [mine]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        self.any(False)


def once_per_pod(group: Group, work: Callable[[], T]) -> T:
    """What `work` gives to the first process of each pod, told to the others of the pod.

    A fault of one ends all, with its words: the others would else wait for it until their time-out, and say less.
    """
    place = group.place
    return _told(group, work, place.first_of_pod)[place.rank - place.local_rank]


def once(group: Group, work: Callable[[], T]) -> T:
    """What `work` gives to the first process of all, told to the others; a fault ends all, with its words."""
    return _told(group, work, group.place.first)[0]


def each(group: Group, work: Callable[[], None]) -> None:
    """Each process does its own; a fault of one ends all, with its words."""
    _told(group, work, True)


def _told(group: Group, work: Callable[[], T], mine: bool) -> list[T]:
    value: T | None = None
    failure: Exception | None = None
    if mine:
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - told to the others first, then raised
            failure = error
    fault = None if failure is None else fault_of(failure)
    told = None if fault is None else (fault.reason, fault.message, fault.hint)
    everyone = group.all_of((told, value))
    if failure is not None:
        raise failure
    for told_by_other, _ in everyone:
        if told_by_other is not None:
            raise Fault(*told_by_other)
    return [cast(T, each) for _, each in everyone]
