"""What is known of a FineTuneJob: attempts, progress, checkpoints, and what was left to Trimtab."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab_api.schema import (
    Model,
    list_map,
)
from trimtab_api.v1alpha1.source import Digest
from trimtab_api.v1alpha1.status import Artifact, Condition, Message, PinnedInput, Predictions, Time


class Attempt(Model):
    """One gang of pods, from start to end."""

    number: Annotated[int, Field(ge=1, le=999)]
    """Counts from 1."""
    uid: Annotated[str | None, Field(max_length=64)] = None
    """UID of its PyTorchJob; absent until that was made."""
    start_time: Time
    """When it began."""
    end_time: Time | None = None
    """When it ended; absent while it runs."""
    per_device_batch_size: Annotated[int | None, Field(ge=1)] = None
    """FineTuneJob: rows in one forward pass of one process."""
    reason: Annotated[str | None, Field(max_length=64)] = None
    """How it ended, a documented word."""
    exit_code: Annotated[int | None, Field(ge=-255, le=255)] = None
    """Exit code of the pod that ended first."""
    from_step: Annotated[int | None, Field(ge=0)] = None
    """Step of the checkpoint it went on from; 0 for none."""
    to_step: Annotated[int | None, Field(ge=0)] = None
    """Last step that was reported."""
    message: Message | None = None
    """What the trainer said of its end."""
    hint: Message | None = None
    """What to do about it."""


class Progress(Model):
    """How far the running attempt is."""

    step: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps done."""
    total_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps in all."""
    steps: Annotated[str, Field(max_length=32)] = ""
    """The two in one text, for the STEP column: 120/500."""
    epoch: Annotated[float | None, Field(ge=0)] = None
    """Passes over the rows done."""
    loss: float | None = None
    """Loss of the last logged steps, mean over tokens."""
    eval_loss: float | None = None
    """Loss on the validation rows."""
    learning_rate: float | None = None
    """Learning rate of the last logged step."""
    grad_norm: float | None = None
    """Norm of the gradient before clipping."""
    metrics: Annotated[dict[str, float], Field(max_length=32)] = Field(default_factory=dict)
    """What the method logs besides, each by its name, newest values: rewards, margins, accuracies; eval_ those of the validation rows, of which eval_exactMatch and the like are the evaluation's."""
    tokens_per_second: Annotated[float | None, Field(ge=0)] = None
    """Tokens of all processes per second."""
    eta_seconds: Annotated[int | None, Field(ge=0)] = None
    """Seconds that are left at the present speed."""
    eta: Annotated[str | None, Field(max_length=32)] = None
    """The same for the ETA column: 4m10s."""
    updated_time: Time | None = None
    """When the trainer said so."""


class CheckpointRecord(Model):
    """A complete checkpoint in storage."""

    step: Annotated[int, Field(ge=0)]
    """Its step."""
    uri: Annotated[str, Field(max_length=1100)]
    """Its prefix."""
    digest: Digest
    """Identity of its manifest."""


class ResolvedFineTune(Model):
    """What was left to Trimtab, as it was decided."""

    image: Annotated[str | None, Field(max_length=512)] = None
    """Trainer image, pinned at the first attempt."""
    rollout_image: Annotated[str | None, Field(max_length=512)] = None
    """Image of the engine beside the trainer, pinned at the first attempt; none without rollout.engine: vllm."""
    tuner_type: Literal["full", "lora"]
    """Which weights move."""
    learning_rate: float
    """Peak learning rate."""
    truncation: Literal["delete", "left", "right", "split"]
    """What becomes of long rows."""
    loss: Literal["all", "assistant", "lastTurn", "lastRound"]
    """Tokens that are learnt."""
    processes_per_node: Annotated[int, Field(ge=1)]
    """Processes in each pod."""
    world_size: Annotated[int, Field(ge=1)]
    """Processes in all."""
    per_device_batch_size: Annotated[int, Field(ge=1)]
    """Rows in one forward pass of one process. Halved when memory runs out, while the global batch stays."""
    strategy: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "deviceMap"] = "ddp"
    """What the processes split among each other; none for a process that is alone."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    """Forward passes to one optimiser step."""
    global_batch_size: Annotated[int, Field(ge=1)]
    """Rows to one optimiser step, of all processes together."""
    output_uri: Annotated[str | None, Field(max_length=1100)] = None
    """Prefix of everything that this job writes."""
    inputs: Annotated[list[PinnedInput], Field(max_length=80, json_schema_extra=list_map("field"))] = Field(
        default_factory=list
    )
    """The inputs as they were when the first attempt began."""


class Memory(Model):
    """What a run takes on one device, or in one process where there is none, estimated before it starts; in bytes."""

    parameters: Annotated[int, Field(ge=0)]
    """Weights of the model."""
    trainable_parameters: Annotated[int, Field(ge=0)]
    """Weights that move."""
    weights_bytes: Annotated[int, Field(ge=0)]
    """Weights, the frozen ones included."""
    gradients_bytes: Annotated[int, Field(ge=0)]
    """Gradients of the weights that move."""
    optimizer_bytes: Annotated[int, Field(ge=0)]
    """State of the optimiser."""
    activations_bytes: Annotated[int, Field(ge=0)]
    """What a forward pass leaves for the backward pass, for the longest rows."""
    overhead_bytes: Annotated[int, Field(ge=0)]
    """Context, libraries and fragments."""
    available_bytes: Annotated[int | None, Field(ge=0)] = None
    """What is there, where it is known."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.overhead_bytes
        )


class FineTuneJobStatus(Model):
    """What is known of the job."""

    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The generation of spec that this status is about."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """Observations; Succeeded leads."""
    start_time: Time | None = None
    """When the first attempt was made; from then on spec is fixed."""
    completion_time: Time | None = None
    """When the job ended."""
    suspended_seconds: Annotated[int, Field(ge=0)] = 0
    """Time spent suspended or held by a queue since the start, in seconds; the deadline leaves it out."""
    attempt: Annotated[int, Field(ge=0, le=999)] = 0
    """Number of the newest attempt."""
    failures: Annotated[int, Field(ge=0, le=999)] = 0
    """Attempts that counted against retries.limit."""
    preemptions: Annotated[int, Field(ge=0, le=999)] = 0
    """Attempts that counted against retries.preemptions."""
    attempts: Annotated[list[Attempt], Field(max_length=32, json_schema_extra=list_map("number"))] = Field(
        default_factory=list
    )
    """The newest attempts."""
    progress: Progress | None = None
    """How far the newest attempt is."""
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=16, json_schema_extra=list_map("step"))] = Field(
        default_factory=list
    )
    """The newest complete checkpoints."""
    resolved: ResolvedFineTune | None = None
    """What was left to Trimtab, as it was decided."""
    memory: Memory | None = None
    """What the run takes on one device, estimated before it started; absent for an architecture that is not known."""
    artifact: Artifact | None = None
    """What the job made."""
    predictions: Predictions | None = None
    """What the tuned model answered in the evaluation."""
