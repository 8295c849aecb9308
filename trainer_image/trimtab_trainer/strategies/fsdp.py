"""FSDP2 by PyTorch: weights, gradients and the optimiser's state are split tensor by tensor.

Zhao et al. 2023, arXiv:2304.11277; the second version splits each tensor by itself
(torch.distributed.fsdp.fully_shard).
"""

from __future__ import annotations

from typing import Any

from trimtab_api.contract import RunConfig


class Fsdp2:
    """See strategies.Strategy."""

    name = "fsdp2"
    splits_weights = True
    master_weights = False

    def __init__(self, config: RunConfig):
        self._config = config

    def prepare(self) -> None:
        """Nothing: the model is split when the trainer takes it."""

    def loading(self) -> dict[str, Any]:
        """Nothing: what is loaded is whole at first."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """The layers to wrap are those that the model's class names (`_no_split_modules`).

        Activations are recomputed by the model, which restores the random state of dropout; FSDP's own way does not.
        """
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "reshard_after_forward": True,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "state_dict_type": "SHARDED_STATE_DICT",
                "cpu_offload": self._config.spec.distributed.offload.parameters,
            },
        }

    def checkpoint_files(self, step: int) -> set[str]:
        """The two indices; what they list may be in fewer files than there are processes."""
        return {"pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"}

    def go_on(self, trainer: Any, checkpoint: str, total_steps: int) -> None:
        """Wrap the model as training would; loading is a part of that."""
        trainer._prepare_for_training(total_steps, None, checkpoint)


def complete(arguments: Any) -> None:
    """What the arguments of transformers cannot say of FSDP; called when they are made."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    settings = arguments.fsdp_plugin_args
    arithmetic = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if arithmetic is not None:
        # By default sums of gradients, and of losses, would be in 16 bit as well.
        settings["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=arithmetic, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if as_accelerators(arguments) and settings.get("cpu_offload"):
        settings["cpu_offload"] = CPUOffloadPolicy(pin_memory=False)


def as_accelerators(arguments: Any) -> bool:
    """Whether the run is on CPUs. accelerate splits over accelerators alone, and copies over CPUs: so it sees some."""
    from accelerate.utils import DistributedType

    state = arguments.distributed_state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state.distributed_type = DistributedType.MULTI_GPU
    return True


def split_layers(model: Any, arguments: Any) -> None:
    """Split the layers of a model that stays as it is, one by one, so that no more than one of them is ever whole.

    TRL splits what is left as one, and all of a reference would be that. `arguments`: of the run, completed.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    settings = arguments.fsdp_plugin_args
    offload = settings.get("cpu_offload")
    if not isinstance(offload, OffloadPolicy):
        offload = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(
                module,
                mp_policy=settings.get("mixed_precision_policy") or MixedPrecisionPolicy(),
                offload_policy=offload,
            )
