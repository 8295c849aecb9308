"""Methods that let the model speak and learn from what it said: grpo, ppo, gkd; and who draws what it says."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trimtab_api.schema import LIST_ATOMIC, Model, OneOf
from trimtab_api.v1alpha1.pod import ResourceAmounts
from trimtab_api.v1alpha1.source import ModelSource, PythonFile

Temperature = Annotated[float, Field(gt=0, le=10)]
Tokens = Annotated[int, Field(ge=1, le=131072)]
Coefficient = Annotated[float, Field(ge=0, le=1000)]
Clip = Annotated[float, Field(gt=0, le=100)]


RewardName = Literal["accuracy", "format", "softOverlong", "repetition", "cosine"]
"""Rewards that are formulas."""


class RewardSource(Model):
    """A model that gives a conversation one number."""

    from_: Annotated[ModelSource, Field(alias="from")]
    """What a FineTuneJob of method rewardModel made, or a classifier with one output. Its own tokenizer and template are used, so they may differ from the tuned model's."""


class PythonReward(Model):
    """A function of the user's. It runs in the trainer's pods, so the installation must allow it (Helm value rewards.python)."""

    config_map_key_ref: PythonFile
    """The file that the function stands in. Its digest is pinned when the job starts."""
    function: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Name of a function at the top of the file. It is called as TRL calls its reward functions: with lists prompts, completions and completion_ids and one list for each further column of the rows, all by name; it returns a number for each completion, or None for one that it has nothing to say of."""


class Reward(OneOf):
    """What an answer earns: exactly one of name, rewardModel and python."""

    members: ClassVar[tuple[str, ...]] = ("name", "rewardModel", "python")

    name: RewardName | None = None
    """accuracy: 1 when the answer is the row's column solution, else 0. format: 1 for <think>…</think><answer>…</answer>, else 0. softOverlong: 0, falling to -1 over the last fifth of maxCompletionLength. repetition: from 0 to -1 by the share of repeated triples of words. cosine: right answers earn more when they are short, wrong ones lose less when they are long; reads solution."""
    reward_model: RewardSource | None = None
    """Ask a reward model."""
    python: PythonReward | None = None
    """Call a function of your own."""
    weight: Annotated[float | None, Field(ge=-1000, le=1000)] = None
    """Factor of this reward in the sum. By default 1."""


class Grpo(Model):
    """Group-relative policy optimisation: answers to one prompt are judged against each other (Shao et al. 2024, arXiv:2402.03300)."""

    rewards: Annotated[list[Reward], Field(min_length=1, max_length=16, json_schema_extra=LIST_ATOMIC)]
    """What an answer earns; the weighted sum counts."""
    num_generations: Annotated[int, Field(ge=2, le=1024)] = 8
    """Answers to each prompt. Must divide the global batch, which is counted in answers."""
    max_completion_length: Tokens = 512
    """Longest answer, in tokens."""
    temperature: Temperature = 0.9
    """Softmax temperature of the sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1
    """Sample from the likeliest tokens that together have this probability."""
    beta: Coefficient = 0.04
    """Weight of the divergence from the model as it was at the start; 0 needs no reference."""
    loss_type: Literal["grpo", "bnpo", "drGrpo", "dapo", "cispo", "sapo"] = "grpo"
    """How token losses are summed and clipped: the mean of each answer's mean (grpo), the mean over tokens of a micro-batch (bnpo) or of the global batch (dapo, arXiv:2503.14476), the sum over a fixed length (drGrpo, arXiv:2503.20783), clipped weights (cispo, arXiv:2506.13585), soft gates (sapo, arXiv:2511.20347)."""
    epsilon: Clip = 0.2
    """How far below 1 the ratio of new to old probability counts."""
    epsilon_high: Clip | None = None
    """How far above 1; by default as far as below. For cispo the largest weight, where 5 is usual."""
    importance_sampling: Literal["token", "sequence"] = "token"
    """Ratios of tokens, or of whole answers (GSPO, arXiv:2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the prompt's answers, of all answers of the round, or by nothing."""
    num_iterations: Annotated[int, Field(ge=1, le=64)] = 1
    """Optimiser passes over the same answers."""


class Ppo(Model):
    """Proximal policy optimisation against a reward model, with a value head on the tuned model's own backbone (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155)."""

    reward_model: RewardSource
    """What an answer earns."""
    kl_coef: Coefficient = 0.05
    """Weight of the divergence from the model as it was at the start, taken off each token's reward."""
    epochs: Annotated[int, Field(ge=1, le=64)] = 4
    """Passes over the answers of a round."""
    num_mini_batches: Annotated[int, Field(ge=1, le=1024)] = 1
    """Optimiser steps of one pass; a round has this many times the global batch of prompts."""
    cliprange: Clip = 0.2
    """How far from 1 the ratio of new to old probability counts."""
    vf_coef: Coefficient = 0.1
    """Weight of the value loss."""
    cliprange_value: Clip = 0.2
    """How far a value may move from that of the round's beginning before it counts no more."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1
    """Discount of later tokens' rewards."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Generalised advantage estimation: 0 trusts the value head, 1 the rewards (arXiv:1506.02438)."""
    missing_eos_penalty: Annotated[float | None, Field(ge=0, le=1000)] = None
    """Taken off the reward of an answer that did not end by itself."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards to variance 1. Advantages always are scaled, and centred."""
    response_length: Tokens = 512
    """Longest answer, in tokens."""
    temperature: Temperature = 0.7
    """Softmax temperature of the sampling."""


class Teacher(Model):
    """The model to learn from."""

    from_: Annotated[ModelSource, Field(alias="from")]
    """A whole model with the tuned model's tokenizer."""


class Gkd(Model):
    """Generalised knowledge distillation: the teacher's next-token distributions, on rows or on what the student says itself (Agarwal et al. 2024, arXiv:2306.13649)."""

    teacher: Teacher
    """The model to learn from."""
    lmbda: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of steps on the student's own answers. 1 needs no answers in the rows, 0 never generates."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Which divergence: 0 is KL(teacher‖student), 1 KL(student‖teacher), between them the generalised Jensen-Shannon divergence."""
    temperature: Temperature = 0.9
    """Softmax temperature of the sampling, and of both distributions in the loss."""
    sft_alpha: Coefficient = 0
    """How much of the rows' own next-token loss is added in steps on rows."""
    max_completion_length: Tokens = 512
    """Longest answer that the student gives, in tokens."""


class Rollout(Model):
    """Who draws the answers that the model learns from."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """transformers: the trained model itself, in the trainer's processes. vllm: an engine beside the trainer, in a container of its own in each of its pods; it is given the adapter, or under full tuning all weights, whenever they have moved."""
    resources: ResourceAmounts = Field(default_factory=ResourceAmounts)
    """Resources of the engine's container, beside those of the trainer in pod.resources: its own GPUs, for example."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Accelerators of the engine that share one copy of the model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of an accelerator's memory that the engine takes."""
