"""How a run is spread over processes and devices: one room a way. Methods know nothing of it."""

from __future__ import annotations

from typing import Any, Protocol

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.endings import Fault
from trimtab_trainer.strategies.fsdp import Fsdp2
from trimtab_trainer.strategies.layers import Layers
from trimtab_trainer.strategies.whole import Whole
from trimtab_trainer.strategies.zero import Zero


class Strategy(Protocol):
    """What differs from one way to another. Every process of a run has one of its own."""

    @property
    def name(self) -> str:
        """Its name in the spec."""
        ...

    splits_weights: bool
    """Whether no process holds the weights whole, so that whoever looks at them must gather them first."""
    master_weights: bool
    """Whether it keeps float32 weights for the optimiser by itself, beside 16-bit ones to compute with."""

    def prepare(self) -> None:
        """Make the process ready, after it joined the others and before a model is loaded."""
        ...

    def loading(self) -> dict[str, Any]:
        """Keywords of from_pretrained, for every model that the run computes with."""
        ...

    def arguments(self) -> dict[str, Any]:
        """Keywords of transformers.TrainingArguments."""
        ...

    def checkpoint_files(self, step: int) -> set[str]:
        """Files without which a checkpoint of that step is not whole, beside each process's own state."""
        ...

    def go_on(self, trainer: Any, checkpoint: str, total_steps: int) -> None:
        """Bring the trainer's model to what a checkpoint of the last step holds, without training."""
        ...


def see_possible(config: RunConfig) -> None:
    """Raise Fault(SpecInvalid) for what the number of processes, known only now, does not allow."""
    offload = config.spec.distributed.offload
    if config.resolved.strategy == "none" and (offload.optimizer or offload.parameters):
        raise Fault(
            Reason.SPEC_INVALID,
            f"distributed.offload: {config.spec.distributed.strategy} splits over several processes, and there is one",
            "Choose zero2 or zero3, which offload alone as well, or give more processes.",
        )
    world, parallel = config.resolved.world_size, config.spec.distributed.parallel
    shared = parallel.sequence
    if world % shared:
        raise Fault(
            Reason.SPEC_INVALID,
            f"distributed.parallel.sequence: {shared} processes cannot share a sequence where there are {world}",
            "Let it divide distributed.nodes x distributed.processesPerNode, or leave it out.",
        )
    for name, size in (("tensor", parallel.tensor), ("expert", parallel.expert)):
        if size > 1 and size != world:
            raise Fault(
                Reason.SPEC_INVALID,
                f"distributed.parallel.{name}: {size} processes would share all layers, and there are {world}",
                "Make it distributed.nodes x distributed.processesPerNode, or leave it out.",
            )


def of(config: RunConfig) -> Strategy:
    """The strategy that was resolved for the run."""
    name, parallel = config.resolved.strategy, config.spec.distributed.parallel
    if parallel.tensor > 1 or parallel.expert > 1:
        return Layers(config)
    if name in ("zero1", "zero2", "zero3"):
        return Zero(config, stage=int(name[-1]))
    if name == "fsdp2":
        return Fsdp2(config)
    return Whole(name)
