"""ZeRO by DeepSpeed: the optimiser's state (1), the gradients too (2), the weights too (3) are split.

Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trimtab_api.contract import RunConfig

SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"
"""DeepSpeed's collectives among the processes of one CPU; it would compile them at its first start."""

PURE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""DeepSpeed's words for an optimiser that keeps nothing in float32."""


@contextmanager
def without_optimizer(arguments: Any) -> Iterator[None]:
    """While it lasts, DeepSpeed's settings say nothing of an optimiser: a model that stays as it is has none.

    TRL starts a reference with the settings of the run, and DeepSpeed refuses pure bfloat16 where no state is split.
    """
    settings = {} if arguments.deepspeed_plugin is None else arguments.deepspeed_plugin.deepspeed_config["bf16"]
    taken = {name: settings.pop(name) for name in PURE if name in settings}
    try:
        yield
    finally:
        settings.update(taken)


class Zero:
    """zero1, zero2 and zero3: see strategies.Strategy."""

    master_weights = True

    def __init__(self, config: RunConfig, stage: int):
        self._config = config
        self._stage = stage
        self.name = f"zero{stage}"
        self._announced: Any = None
        self.splits_weights = stage == 3

    def prepare(self) -> None:
        """Start DeepSpeed, and let models be loaded in parts.

        Its process group must be there before: else it takes the world for one process while a model is loaded.
        """
        import deepspeed
        import torch
        import torch.distributed as dist
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OPERATOR] = False
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if not dist.is_initialized():
            # Alone, for its offloading: nobody is to be met.
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        limit = datetime.timedelta(seconds=self._config.spec.distributed.timeout_seconds)
        deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False)
        # transformers holds it by a weak reference: as long as it lives, stage 3 splits what is loaded.
        self._announced = HfDeepSpeedConfig(self._settings(batch=True))

    def loading(self) -> dict[str, Any]:
        """Nothing: stage 3 splits what is loaded by itself, once it is announced."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """DeepSpeed's settings; what a method's own arguments decide is left to them."""
        adapter = self._config.resolved.tuner_type != "full"
        # Without re-entrance stage 3 finds a recomputed weight of an adapter's layer in parts (DeepSpeed 8130).
        return {
            "deepspeed": self._settings(batch=False),
            "gradient_checkpointing_kwargs": {"use_reentrant": self._stage == 3 and adapter},
        }

    def _settings(self, batch: bool) -> dict[str, Any]:
        from trimtab_trainer.arguments import precision

        training, resolved = self._config.spec.training, self._config.resolved
        arithmetic = precision(self._config)
        bf16: dict[str, Any] = {"enabled": arithmetic == "bfloat16"}
        if training.pure_bf16:
            bf16 |= dict.fromkeys(PURE, True)
        sizes: dict[str, Any] = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
        )
        if batch:
            sizes = {
                "train_micro_batch_size_per_gpu": resolved.per_device_batch_size,
                "gradient_accumulation_steps": resolved.gradient_accumulation_steps,
                # As DeepSpeed counts rows: it knows nothing of processes that share them.
                "train_batch_size": resolved.per_device_batch_size
                * resolved.gradient_accumulation_steps
                * resolved.world_size,
            }
        return {
            **sizes,
            "gradient_clipping": training.max_grad_norm,
            "zero_optimization": self._partition(automatic=not batch),
            "bf16": bf16,
            "fp16": {"enabled": arithmetic == "float16"},
            # torch's AdamW steps on a CPU without a compiler; DeepSpeed's own would have to be built first.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 30,
            "wall_clock_breakdown": False,
            "checkpoint": {"use_node_local_storage": True},
        }

    def _partition(self, automatic: bool) -> dict[str, Any]:
        import torch

        offload, accelerated = self._config.spec.distributed.offload, torch.cuda.is_available()
        target = {"device": "cpu", "pin_memory": accelerated}
        partition: dict[str, Any] = {
            "stage": self._stage,
            "contiguous_gradients": True,
            "overlap_comm": accelerated,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        if automatic:
            partition["reduce_bucket_size"] = "auto"
            if self._stage == 3:
                partition |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
        if offload.optimizer:
            partition["offload_optimizer"] = target
        if offload.parameters:
            partition["offload_param"] = target
        return partition

    def checkpoint_files(self, step: int) -> set[str]:
        """Each process's part of the optimiser; each one's part of the weights in stage 3, else one for all."""
        from trimtab_trainer.arguments import precision

        folder, world = f"global_step{step}", self._config.resolved.world_size
        prefix = "bf16_" if precision(self._config) == "bfloat16" else ""
        wanted = {f"{folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)}
        if self._stage == 3:
            wanted |= {f"{folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)}
        else:
            wanted.add(f"{folder}/mp_rank_00_model_states.pt")
        return wanted | {"latest", "scheduler.pt"}

    def go_on(self, trainer: Any, checkpoint: str, total_steps: int) -> None:
        """Wrap the model as training would; loading is a part of that."""
        trainer._prepare_for_training(total_steps, None, checkpoint)
