"""Layers that all processes share: each holds a part of every matrix (tensor), or some of the experts (expert).

Shoeybi et al. 2019, arXiv:1909.08053; Lepikhin et al. 2020, arXiv:2006.16668. Which matrix is split how, transformers
says of each of its models. All processes take the same rows, and what is not split each of them computes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.endings import Fault

FOLDER = "layers"
"""Of a checkpoint: torch.distributed.checkpoint's, of weights and optimiser."""


class Layers:
    """See strategies.Strategy."""

    splits_weights = True
    master_weights = False

    def __init__(self, config: RunConfig):
        parallel = config.spec.distributed.parallel
        self._experts = parallel.expert > 1
        self._size = max(parallel.tensor, parallel.expert)
        self.name = "expert" if self._experts else "tensor"

    def prepare(self) -> None:
        """Nothing: the model is split while it is loaded."""

    def loading(self) -> dict[str, Any]:
        """By the model's own plan."""
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(tp_size=self._size, tp_plan="auto", enable_expert_parallel=self._experts)
        return {"distributed_config": plan}

    def arguments(self) -> dict[str, Any]:
        """The library counts processes that take the same rows as one."""
        from accelerate import ParallelismConfig

        return {"parallelism_config": ParallelismConfig(tp_size=self._size)}

    def checkpoint_files(self, step: int) -> set[str]:
        """The index; what it lists may be in fewer files than there are processes."""
        return {f"{FOLDER}/.metadata", "scheduler.pt"}

    def go_on(self, trainer: Any, checkpoint: str, total_steps: int) -> None:
        """The weights are all there is to load."""
        load(trainer.model, None, Path(checkpoint) / FOLDER)


def see_splittable(described: Mapping[str, Any], config: RunConfig) -> None:
    """Raise Fault(ModelInvalid) for a model whose layers the processes cannot share, by its config.json."""
    parallel = config.spec.distributed.parallel
    text = described.get("text_config") or described
    experts = next((text[each] for each in ("num_experts", "num_local_experts") if text.get(each)), None)
    if "vision_config" in described or "audio_config" in described:
        raise _not_splittable("it sees or hears, which was not tried")
    if parallel.expert > 1:
        if not isinstance(experts, int) or experts % parallel.expert:
            raise _not_splittable(f"its {experts or 0} experts are no multiple of {parallel.expert}")
        return
    if experts is not None:
        raise _not_splittable("it has experts: distributed.parallel.expert shares them")
    heads = text.get("num_attention_heads")
    for name, number in (("attention heads", heads), ("key heads", text.get("num_key_value_heads") or heads)):
        if not isinstance(number, int) or number % parallel.tensor:
            raise _not_splittable(f"its {number} {name} are no multiple of {parallel.tensor}")


def see_split(model: Any) -> None:
    """Raise Fault(ModelInvalid) when no weight of a loaded model is split: transformers has no plan for it."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise _not_splittable(f"transformers has no plan for {model.config.model_type}")


def _not_splittable(why: str) -> Fault:
    return Fault(
        Reason.MODEL_INVALID,
        f"distributed.parallel does not go with this model: {why}",
        "Leave tensor and expert out, and choose zero3 or fsdp2, which split the weights of every model.",
    )


class InParts:
    """Mixed into a transformers.Trainer, before it in the order of bases: all save and load what they hold in parts."""

    @property
    def in_parts(self) -> bool:
        """Whether processes share layers."""
        trainer: Any = self
        return trainer.args.parallelism_config is not None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        import torch

        trainer: Any = self
        if not self.in_parts:
            base: Any = super()
            base._save_optimizer_and_scheduler(output_dir)
            return
        save(trainer.model, trainer.optimizer.optimizer, Path(output_dir) / FOLDER)
        if trainer.args.should_save:
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.in_parts:  # the weights come with the optimiser
            base: Any = super()
            base._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        import torch

        trainer: Any = self
        if not self.in_parts or checkpoint is None:
            base: Any = super()
            base._load_optimizer_and_scheduler(checkpoint)
            return
        load(trainer.model, trainer.optimizer.optimizer, Path(checkpoint) / FOLDER)
        trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def save(model: Any, optimizer: Any, folder: Path) -> None:
    """Write what this process holds of weights and optimiser. All processes call it together."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: Any, optimizer: Any, folder: Path) -> None:
    """Take over what this process held. `optimizer`: None to take the weights alone."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    if optimizer is None:
        weights = get_model_state_dict(model)
        checkpoint.load({"model": weights}, checkpoint_id=folder)
        set_model_state_dict(model, weights)
        return
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
