"""What a FineTuneJob leaves open, decided the same way by the operator and by a run without a cluster."""

from __future__ import annotations

import math
from typing import Literal

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.model import Scratch
from trimtab_api.v1alpha1.progress import ResolvedFineTune

GLOBAL_BATCH = 16
"""Smallest global batch that the default accumulation reaches, in rows (ms-swift's default)."""

WHOLE_ROWS = frozenset({"rewardModel", "sequenceClassification", "embedding", "reranker"})
"""Methods that learn from rows as a whole, with no loss for each token."""

FULL_LEARNING_RATE = {
    "dpo": 1e-6,
    "kto": 1e-6,
    "cpo": 1e-6,
    "simpo": 1e-6,
    "orpo": 1e-6,
    "grpo": 1e-6,
    "ppo": 1e-6,
    "embedding": 2e-5,
}
"""Of full tuning, for the methods that want other than 1e-5: a preference is a smaller step than an instruction."""

LORA_LEARNING_RATE = {"grpo": 1e-5, "ppo": 1e-5}
"""Of adapters, for the methods that want less than 1e-4: what they learn from moves with the model."""

GPU_RESOURCE = "nvidia.com/gpu"

SMALL_SCRATCH = 1_000_000_000
"""Weights up to which a model from scratch fits every process with its optimiser's state, 16 bytes a weight."""

ResolvedStrategy = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "deviceMap"]
"""What `auto` becomes, beside what can be asked for."""


def resolve(spec: FineTuneJobSpec, image: str | None = None, output_uri: str | None = None) -> ResolvedFineTune:
    """Fill in what the spec leaves open. Pure; the same spec gives the same answer."""
    tuner = spec.tuner.type or ("full" if spec.model.scratch or _asks_the_base(spec) else "lora")
    processes = processes_per_node(spec)
    world = spec.distributed.nodes * processes
    # Processes that share a row take the same ones.
    one_pass = max(1, world // spec.distributed.parallel.together) * spec.training.per_device_batch_size
    accumulation = spec.training.gradient_accumulation_steps or default_accumulation(spec, one_pass)
    truncation = spec.dataset.truncation
    loss = spec.dataset.loss
    pretrain, whole = spec.method == "pretrain", spec.method in WHOLE_ROWS
    return ResolvedFineTune(
        image=image,
        tuner_type=tuner,
        learning_rate=spec.training.learning_rate or default_learning_rate(spec.method, tuner, spec.model.scratch),
        truncation=truncation if truncation != "auto" else default_truncation(spec.method),
        loss=loss if loss != "auto" else ("all" if pretrain or whole else "assistant"),
        processes_per_node=processes,
        world_size=world,
        per_device_batch_size=spec.training.per_device_batch_size,
        strategy=strategy(spec, tuner, world),
        gradient_accumulation_steps=accumulation,
        global_batch_size=one_pass * accumulation,
        output_uri=output_uri,
    )


def _asks_the_base(spec: FineTuneJobSpec) -> bool:
    """Whether nothing is learnt, and no adapter is there to be asked."""
    return not spec.learns and spec.tuner.continue_from is None and not spec.tuner.adapters


def default_truncation(method: str) -> Literal["delete", "right", "split"]:
    """Documents are split, texts to embed cut at their end as whoever embeds will cut them, all else is left whole."""
    return "split" if method == "pretrain" else "right" if method == "embedding" else "delete"


def strategy(spec: FineTuneJobSpec, tuner: str, world: int) -> ResolvedStrategy:
    """How the run is spread.

    One process has nothing to split; offloading still needs DeepSpeed, which then works alone. By default an adapter
    takes ddp: its gradients and optimiser are small, and whole weights cost no traffic. Full tuning takes zero2: the
    optimiser's state is three quarters of its memory, and splitting it costs no more traffic than ddp. Weights that do
    not fit one device want zero3 or fsdp2, which the spec alone cannot know. An optimiser whose state is not
    split takes ddp.
    """
    asked = spec.distributed.strategy
    if asked == "deviceMap":
        return asked
    if world == 1:
        return asked if asked in ("zero1", "zero2", "zero3") and _offloads(spec) else "none"
    if asked != "auto":
        return asked
    if not spec.learns or spec.training.optimizer != "adamw":
        return "ddp"
    if spec.distributed.parallel.tensor > 1 or spec.distributed.parallel.expert > 1:
        return "ddp"
    if tuner != "full" or (spec.model.scratch is not None and scratch_weights(spec.model.scratch) <= SMALL_SCRATCH):
        return "ddp"
    return "zero2"


def _offloads(spec: FineTuneJobSpec) -> bool:
    return spec.distributed.offload.optimizer or spec.distributed.offload.parameters


def scratch_weights(scratch: Scratch) -> int:
    """About how many weights a decoder of these sizes has, embeddings left out."""
    hidden = scratch.hidden_size
    inner = scratch.intermediate_size or -(-hidden * 8 // 3)
    return scratch.layers * (4 * hidden * hidden + 3 * hidden * inner)


def processes_per_node(spec: FineTuneJobSpec) -> int:
    """Processes in each pod: as asked for, else one with a device map, else one per GPU of the pod, else one."""
    if spec.distributed.processes_per_node is not None:
        return spec.distributed.processes_per_node
    if spec.distributed.strategy == "deviceMap":
        return 1
    gpus = spec.pod.resources.limits.get(GPU_RESOURCE, 1)
    return max(1, int(gpus)) if str(gpus).isdigit() else 1


def default_accumulation(spec: FineTuneJobSpec, one_pass: int) -> int:
    """Enough for GLOBAL_BATCH rows; under grpo also for whole groups of answers."""
    enough = math.ceil(GLOBAL_BATCH / one_pass)
    if spec.grpo is None:
        return enough
    groups = math.lcm(one_pass, spec.grpo.num_generations) // one_pass
    return math.ceil(enough / groups) * groups


def default_learning_rate(method: str, tuner: str, scratch: Scratch | None) -> float:
    """1e-4 for adapters and 1e-5 for full tuning (ms-swift); random weights want 1e-3, large ones 3e-4."""
    if scratch is not None:
        return 1e-3 if scratch.hidden_size <= 1024 else 3e-4
    return LORA_LEARNING_RATE.get(method, 1e-4) if tuner == "lora" else FULL_LEARNING_RATE.get(method, 1e-5)
