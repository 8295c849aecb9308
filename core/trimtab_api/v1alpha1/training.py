"""The optimisation, its checkpoints, and the processes that it is spread over."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    Model,
    Rule,
    rules,
)
from trimtab_api.v1alpha1.pod import Quantity

Optimizer = Literal["adamw", "adamw8bit", "adafactor", "lion", "sgd"]
LearningRate = Annotated[float, Field(gt=0, le=1)]


class Scheduler(Model):
    """How the learning rate moves."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.minLearningRate) || self.type == 'cosine'",
                "leave it out, or set type: cosine: the other shapes have no floor",
                field_path=".minLearningRate",
            )
        )
    )

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[float, Field(ge=0, le=1_000_000)] = 0.05
    """Rise from zero: below 1 a fraction of all steps, else a number of steps."""
    min_learning_rate: Annotated[float | None, Field(ge=0, le=1)] = None
    """Floor of the cosine."""


class EarlyStopping(Model):
    """When a run ends before its last step."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations in a row that do not better the best loss."""
    threshold: Annotated[float, Field(ge=0, le=100)] = 0
    """By how much a loss must be better to count."""


class Training(Model):
    """The optimisation."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.learningRate) || !has(self.scheduler.minLearningRate) || "
                "self.scheduler.minLearningRate <= self.learningRate",
                "must not exceed learningRate: it is the floor that the rate falls to",
                field_path=".scheduler.minLearningRate",
            )
        )
    )

    epochs: Annotated[float, Field(gt=0, le=10000)] = 1
    """Passes over the rows; maxSteps wins when it is given."""
    max_steps: Annotated[int | None, Field(ge=0, le=100_000_000)] = None
    """Optimiser steps in all. 0 learns nothing: the model as it is answers the validation rows, and the answers are what the job makes."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Rows in one forward pass of one process."""
    gradient_accumulation_steps: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Forward passes to one optimiser step. By default enough for a global batch of at least 16 rows."""
    learning_rate: LearningRate | None = None
    """Peak learning rate. By default 1e-4 for LoRA, 1e-5 for full tuning (1e-6 where it learns preferences, 2e-5 for embedding), a tenth of both for grpo and ppo, and 1e-3 falling to 3e-4 with size for a model from scratch."""
    scheduler: Scheduler = Field(default_factory=Scheduler)
    """How the learning rate moves."""
    optimizer: Optimizer = "adamw"
    """adamw8bit (bitsandbytes) keeps the state of large tensors in a quarter of the memory; adafactor in almost none; lion keeps one moment and wants a third to a tenth of the learning rate; sgd keeps none and wants a far larger one."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decay of the weights, independent of the gradient."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1
    """Gradients are scaled down to this norm; 0 leaves them."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    neftune_alpha: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914); 5 is the smallest that the paper tried."""
    early_stopping: EarlyStopping | None = None
    """End when the validation loss no longer falls. By default all steps are done."""
    evaluate_at_start: bool = False
    """Evaluate once before the first step, when there are validation rows."""
    dataloader_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that put batches together ahead of time; rows are tokens already, so that 0 is right but for large media."""
    group_by_length: bool = False
    """Put rows of like length into one batch: less padding, and an order that is less random."""
    pure_bf16: bool = False
    """Keep weights, gradients and the optimiser's state of full tuning in bfloat16: about 8 bytes a weight in place of 16. Updates below one part in 256 of a weight are rounded away, so raise learningRate."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of weights, dropout and order."""
    logging_steps: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Steps between two reports of loss."""
    eval_steps: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    """Steps between two evaluations, when there are validation rows. By default as often as a checkpoint is made."""


class Checkpoint(Model):
    """What is kept so that a run can go on."""

    save_steps: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    """Steps between two checkpoints. By default a tenth of the run."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Complete checkpoints that stay in storage."""


Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2", "deviceMap"]
"""The ways to spread a run over processes and devices that work."""


class Offload(Model):
    """What waits in main memory."""

    optimizer: bool = False
    """The optimiser's state, and its step: zero1, zero2 and zero3."""
    parameters: bool = False
    """The weights: zero3 and fsdp2. fsdp2 takes gradients and the optimiser along."""


class Parallel(Model):
    """How many processes work at one row together. At most one of these is above 1."""

    sequence: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share each sequence, for sequences that do not fit one device: each holds a part of the tokens and, in attention, a part of the heads (Ulysses). The other processes take other rows, so a step has as many rows as processes / sequence take. For pretrain and sft, of models that look at all tokens before."""
    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share each layer: each holds a part of every matrix. All processes of the run, which then take the same rows. For full tuning with pretrain and sft, of models without experts."""
    expert: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the experts of a mixture: each holds some of them. All processes of the run, which then take the same rows. For full tuning with pretrain and sft."""
    context: Annotated[int, Field(ge=1, le=64)] = 1
    """Must be 1; sequence shares sequences in every strategy."""

    @property
    def together(self) -> int:
        """Processes that take the same rows."""
        return self.sequence * self.tensor * self.expert


class Distributed(Model):
    """Over how many processes the rows are spread."""

    nodes: Annotated[int, Field(ge=1, le=999)] = 1
    """Pods."""
    processes_per_node: Annotated[int | None, Field(ge=1, le=64)] = None
    """Processes in each pod. By default the number of nvidia.com/gpu in pod.resources.limits, or 1."""
    strategy: Strategy = "auto"
    """What the processes split among each other. ddp: the rows alone. zero1, zero2, zero3 (DeepSpeed): also the optimiser's state; and the gradients; and the weights. fsdp2 (PyTorch): all of these. deviceMap: one process lays the layers over its pod's devices. auto: ddp for adapters and small models from scratch, zero2 for full tuning."""
    offload: Offload = Field(default_factory=Offload)
    """What waits in the pod's main memory while the device does not need it: slower, and room for larger models."""
    parallel: Parallel = Field(default_factory=Parallel)
    """How many processes work at one row together."""
    device_memory: Quantity | None = None
    """Memory of one accelerator, for example 80Gi: a run that cannot fit is then refused before it starts. Without accelerators pod.resources.limits.memory says it."""
    timeout_seconds: Annotated[int, Field(ge=30, le=86400)] = 1800
    """How long a collective operation may wait for the other processes, in seconds."""
