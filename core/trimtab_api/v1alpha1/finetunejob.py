"""FineTuneJob: a model, rows and a method become an adapter or a model in object storage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    Column,
    Model,
    ObjectMeta,
    Resource,
    fixed_once_started,
    rules,
)
from trimtab_api.v1alpha1.combinations import COMBINATIONS
from trimtab_api.v1alpha1.dataset import Dataset, Template
from trimtab_api.v1alpha1.evaluation import Evaluation
from trimtab_api.v1alpha1.heads import Classification, Embedding, Reranker, RewardModel
from trimtab_api.v1alpha1.model import FineTuneModel
from trimtab_api.v1alpha1.output import Output
from trimtab_api.v1alpha1.pod import Pod
from trimtab_api.v1alpha1.preference import Cpo, Dpo, Kto, Orpo, Simpo
from trimtab_api.v1alpha1.progress import FineTuneJobStatus
from trimtab_api.v1alpha1.reports import Reports
from trimtab_api.v1alpha1.rollout import Gkd, Grpo, Ppo, Rollout
from trimtab_api.v1alpha1.source import Storage
from trimtab_api.v1alpha1.training import Checkpoint, Distributed, Training
from trimtab_api.v1alpha1.tuner import Tuner

Method = Literal[
    "pretrain",
    "sft",
    "dpo",
    "kto",
    "cpo",
    "simpo",
    "orpo",
    "grpo",
    "ppo",
    "gkd",
    "rewardModel",
    "sequenceClassification",
    "embedding",
    "reranker",
]
"""The tuning methods that work."""


class Retries(Model):
    """How often a job is started again by itself."""

    limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Attempts after a failure that may pass by itself."""
    preemptions: Annotated[int, Field(ge=0, le=800)] = 100
    """Attempts after a preemption or a drained node; they do not count against limit."""


class FineTuneJobSpec(Model):
    """What to tune, on what, and how. method, model and dataset are enough for a sensible run."""

    model_config = ConfigDict(json_schema_extra=rules(*COMBINATIONS))

    method: Method
    """The tuning method. pretrain learns every token of text or conversations, sft learns the answers; dpo, cpo, simpo and orpo learn which of two answers is better, kto which answers are good; grpo and ppo learn from rewards for what the model says, gkd from a teacher; rewardModel, sequenceClassification, embedding and reranker make models that answer with numbers."""
    model: FineTuneModel
    """What is tuned."""
    dataset: Dataset
    """The rows."""
    template: Template = Field(default_factory=Template)
    """How a conversation becomes text."""
    tuner: Tuner = Field(default_factory=Tuner)
    """Which weights move."""
    training: Training = Field(default_factory=Training)
    """The optimisation."""
    evaluation: Evaluation | None = None
    """Let the tuned model answer the validation rows, and score what it says. By default only the validation loss is told."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """What is kept so that a run can go on."""
    distributed: Distributed = Field(default_factory=Distributed)
    """Over how many processes the rows are spread."""
    dpo: Dpo | None = None
    """Knobs of method dpo."""
    kto: Kto | None = None
    """Knobs of method kto."""
    cpo: Cpo | None = None
    """Knobs of method cpo."""
    simpo: Simpo | None = None
    """Knobs of method simpo."""
    orpo: Orpo | None = None
    """Knobs of method orpo."""
    grpo: Grpo | None = None
    """Knobs of method grpo."""
    ppo: Ppo | None = None
    """Knobs of method ppo."""
    gkd: Gkd | None = None
    """Knobs of method gkd."""
    rollout: Rollout | None = None
    """Who draws the answers of grpo, ppo and gkd; by default the trained model itself."""
    reward_model: RewardModel | None = None
    """Knobs of method rewardModel."""
    classification: Classification | None = None
    """The labels of method sequenceClassification."""
    embedding: Embedding | None = None
    """Knobs of method embedding."""
    reranker: Reranker | None = None
    """Knobs of method reranker."""
    reports: Reports = Field(default_factory=Reports)
    """Experiment trackers that are told of the run."""
    output: Output = Field(default_factory=Output)
    """Where checkpoints and the artifact go."""
    storage: Storage | None = None
    """How to reach object storage, for every source and the output that do not say otherwise."""
    pod: Pod = Field(default_factory=Pod)
    """How the pods run."""
    suspend: bool = False
    """true stops the job after its next checkpoint and keeps it stopped; false lets it go on from there."""
    retries: Retries = Field(default_factory=Retries)
    """How often the job is started again by itself."""
    active_deadline_seconds: Annotated[int | None, Field(ge=1, le=31_536_000)] = None
    """Longest time from the first start to the end, in seconds; time suspended or held by a queue is left out."""
    hang_timeout_seconds: Annotated[int, Field(ge=60, le=604_800)] = 1800
    """A run that reports no step for this long, in seconds, is ended and started again from its checkpoint."""
    ttl_seconds_after_finished: Annotated[int | None, Field(ge=0, le=31_536_000)] = None
    """The resource is deleted this long after its end, in seconds. What it made in storage stays."""

    @property
    def asks_vllm(self) -> bool:
        """Whether an engine beside the trainer draws answers."""
        return self.rollout is not None and self.rollout.engine == "vllm"

    @property
    def learns(self) -> bool:
        """Whether anything is trained; a job that learns nothing answers."""
        return self.training.max_steps != 0


class FineTuneJob(Model):
    """Tunes a model on rows and publishes an adapter or a model in object storage."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra=rules(
            *(
                fixed_once_started(field)
                for field in (
                    "method", "model", "dataset", "template", "tuner", "training", "evaluation",
                    "checkpoint", "distributed",
                    "dpo", "kto", "cpo", "simpo", "orpo",
                    "grpo", "ppo", "gkd", "rollout",
                    "rewardModel", "classification", "embedding", "reranker",
                    "reports", "output", "storage", "pod", "retries", "activeDeadlineSeconds", "hangTimeoutSeconds",
                )
            )
        ),
    )  # fmt: skip

    metadata: ObjectMeta
    spec: FineTuneJobSpec
    """What to tune, on what, and how."""
    status: FineTuneJobStatus | None = None
    """What is known of the job."""


FINE_TUNE_JOB = Resource(
    kind="FineTuneJob",
    plural="finetunejobs",
    short_names=("ftj",),
    model=FineTuneJob,
    columns=(
        Column(name="METHOD", type="string", json_path=".spec.method", description="Tuning method."),
        Column(
            name="STATE",
            type="string",
            json_path='.status.conditions[?(@.type=="Succeeded")].reason',
            description="Reason of the condition Succeeded.",
        ),
        Column(
            name="STEP",
            type="string",
            json_path=".status.progress.steps",
            description="Steps done and in all.",
        ),
        Column(
            name="LOSS",
            type="number",
            json_path=".status.progress.loss",
            description="Loss of the last steps.",
        ),
        Column(name="ETA", type="string", json_path=".status.progress.eta", description="Time that is left."),
        Column(name="ATTEMPT", type="integer", json_path=".status.attempt", description="Newest attempt."),
        Column(
            name="AGE",
            type="date",
            json_path=".metadata.creationTimestamp",
            description="Time since creation.",
        ),
        Column(
            name="MESSAGE",
            type="string",
            json_path='.status.conditions[?(@.type=="Succeeded")].message',
            description="Message of the condition Succeeded.",
            priority=1,
        ),
    ),
)
