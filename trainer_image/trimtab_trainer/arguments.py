"""The spec in the words of the library: one function from RunConfig to the trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from trimtab_api.contract import RunConfig
from trimtab_trainer import strategies
from trimtab_trainer.strategies.fsdp import as_accelerators, complete

SAVES_IN_A_RUN = 10
"""Checkpoints in a run that says nothing of it."""


_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
    "lion": "lion_32bit",
    "sgd": "sgd",
}
"""By the name that a spec uses, as transformers calls them."""


class UnnumberedCpu:
    """Mixed into a library's arguments, before them in the order of bases: their CPU has no number then.

    transformers restores an optimiser to `args.device`; torch writes tensors of "cpu" and cannot place them on "cpu:0".
    """

    fsdp: Any
    parallelism_config: Any

    @property
    def device(self) -> Any:
        """Where this process computes."""
        base: Any = super()
        return torch.device("cpu") if base.device.type == "cpu" else base.device

    def __post_init__(self) -> None:
        """What FSDP and shared layers need beyond their settings."""
        base: Any = super()
        base.__post_init__()
        if self.fsdp:
            complete(self)
        if self.parallelism_config is not None:
            as_accelerators(self)

    @property
    def n_gpu(self) -> int:
        """Devices of this process: the library would copy the model to each that it sees (torch's DataParallel)."""
        base: Any = super()
        return min(1, int(base.n_gpu))


class Arguments(UnnumberedCpu, SFTConfig):
    """SFTConfig for runs on any device."""


def precision(config: RunConfig) -> str:
    """What the arithmetic is done in: float32, bfloat16 or float16."""
    asked = config.spec.model.dtype
    if config.spec.training.pure_bf16:
        return "bfloat16"
    if asked != "auto":
        return asked
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def weight_dtype(config: RunConfig) -> Any:
    """What the weights are loaded in. Full tuning keeps float32: in bfloat16 small updates are rounded away.

    A strategy that keeps float32 weights beside the ones to compute with takes the precision of the arithmetic.
    """
    kept_elsewhere = config.spec.training.pure_bf16 or strategies.of(config).master_weights
    if config.resolved.tuner_type == "full" and config.spec.learns and not kept_elsewhere:
        return torch.float32
    return getattr(torch, precision(config))


def arguments(config: RunConfig, folder: Path, validated: bool) -> Arguments:
    """The arguments of next-token prediction. `validated`: there are validation rows."""
    return Arguments(
        **common(config, folder, validated), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None
    )


def common(config: RunConfig, folder: Path, validated: bool) -> dict[str, Any]:
    """The arguments that every trainer takes, as keywords of transformers.TrainingArguments.

    `validated`: there are validation rows. A class made of them must have UnnumberedCpu mixed in.
    """
    spec, training = config.spec, config.spec.training
    arithmetic, strategy = precision(config), strategies.of(config)
    # Weights in bfloat16 need no conversion on the way; DeepSpeed asks for the word all the same.
    converted = not training.pure_bf16 or strategy.master_weights
    save_steps: float = spec.checkpoint.save_steps or 1 / SAVES_IN_A_RUN
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=config.resolved.per_device_batch_size,
        per_device_eval_batch_size=config.resolved.per_device_batch_size,
        gradient_accumulation_steps=config.resolved.gradient_accumulation_steps,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=config.resolved.learning_rate,
        **_schedule(config),
        optim=_OPTIMIZERS[training.optimizer],
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        seed=training.seed,
        data_seed=spec.dataset.seed,
        train_sampling_strategy=_sampling(config),
        neftune_noise_alpha=training.neftune_alpha,
        eval_on_start=training.evaluate_at_start and validated,
        dataloader_num_workers=training.dataloader_workers,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_steps,
        eval_strategy="steps" if validated else "no",
        eval_steps=(training.eval_steps or save_steps) if validated else None,
        prediction_loss_only=True,
        bf16=arithmetic == "bfloat16" and converted,
        fp16=arithmetic == "float16",
        use_cpu=not torch.cuda.is_available(),
        ddp_timeout=spec.distributed.timeout_seconds,
        ddp_find_unused_parameters=False,
        # A stream keeps its own place; no row of it is read twice.
        ignore_data_skip=spec.dataset.streaming is not None,
        save_on_each_node=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
        **{"gradient_checkpointing_kwargs": {"use_reentrant": False}, **strategy.arguments()},
    )


def _sampling(config: RunConfig) -> str:
    if config.spec.training.group_by_length:
        return "group_by_length"
    return "random" if config.spec.dataset.shuffle else "sequential"


def _schedule(config: RunConfig) -> dict[str, Any]:
    scheduler = config.spec.training.scheduler
    floor = scheduler.min_learning_rate
    if scheduler.type == "cosine" and floor is not None:
        kind: dict[str, Any] = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": floor}}
    elif scheduler.type == "constant":
        kind = {"lr_scheduler_type": "constant_with_warmup"}
    else:
        kind = {"lr_scheduler_type": scheduler.type}
    return {**kind, "warmup_steps": scheduler.warmup}
