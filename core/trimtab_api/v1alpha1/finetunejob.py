"""FineTuneJob: a model, rows and a method become an adapter or a model in object storage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    LIST_ATOMIC,
    Column,
    Model,
    ObjectMeta,
    OneOf,
    Resource,
    Rule,
    fixed_once_started,
    list_map,
    rules,
)
from trimtab_api.v1alpha1.pod import Pod
from trimtab_api.v1alpha1.source import DataSource, Digest, ModelSource, S3Uri, Storage
from trimtab_api.v1alpha1.status import Artifact, Condition, Message, PinnedInput, Time

Method = Literal["pretrain", "sft"]
"""The tuning methods that work."""

LearningRate = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class TokenizerTraining(Model):
    """A byte-level BPE learnt from the job's own rows, with a ChatML template."""

    vocab_size: Annotated[int, Field(ge=272, le=262144)] = 512
    """Size of the vocabulary, special tokens included."""


class Tokenizer(OneOf):
    """The tokenizer of a model that starts from random weights: exactly one member."""

    members: ClassVar[tuple[str, ...]] = ("from", "train")

    from_: Annotated[ModelSource | None, Field(alias="from")] = None
    """Take the tokenizer of this model."""
    train: TokenizerTraining | None = None
    """Learn one from the rows of this job."""


class Scratch(Model):
    """A model with random weights, in any architecture that transformers knows."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.hiddenSize % self.attentionHeads == 0",
                "must be a multiple of attentionHeads",
                field_path=".hiddenSize",
            ),
            Rule(
                "!has(self.keyValueHeads) || self.attentionHeads % self.keyValueHeads == 0",
                "must divide attentionHeads",
                field_path=".keyValueHeads",
            ),
        )
    )

    model_type: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """The architecture as transformers names it, for example llama or qwen2."""
    hidden_size: Annotated[int, Field(ge=16, le=65536)]
    """Width of the residual stream."""
    intermediate_size: Annotated[int | None, Field(ge=16, le=262144)] = None
    """Width of the feed-forward layers; by default 8/3 of hiddenSize, rounded up to a multiple of 16."""
    layers: Annotated[int, Field(ge=1, le=512)]
    """Number of blocks."""
    attention_heads: Annotated[int, Field(ge=1, le=512)]
    """Heads of each attention; hiddenSize is divided among them."""
    key_value_heads: Annotated[int | None, Field(ge=1, le=512)] = None
    """Heads of keys and values; by default as many as attentionHeads."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest sequence the model is made for, in tokens."""
    tie_embeddings: bool | None = None
    """Share the matrix of embeddings and head; by default true when hiddenSize is at most 2048."""
    extra: Annotated[str | None, Field(max_length=16384)] = None
    """JSON object with further keys of the architecture's configuration."""
    tokenizer: Tokenizer
    """The tokenizer; vocabulary and special tokens of the model follow it."""


class FineTuneModel(Model):
    """What is tuned: an existing model, or random weights."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "has(self.from) != has(self.scratch)",
                "give exactly one of from (an existing model) and scratch (random weights)",
            )
        )
    )

    from_: Annotated[ModelSource | None, Field(alias="from")] = None
    """The model to start from."""
    scratch: Scratch | None = None
    """Start from random weights; full tuning only."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the arithmetic. auto is bfloat16 on an accelerator that has it, else float32. With full tuning the weights themselves are kept in float32."""


class DataPart(Model):
    """One source of rows."""

    from_: Annotated[DataSource, Field(alias="from")]
    """Where the rows are."""
    format: Literal["auto", "messages", "queryResponse", "text"] = "auto"
    """How a row is written. auto tells by the columns of the first row."""
    columns: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    """Columns to rename before the format is read: from the name in the file to the standard name."""
    sample: Annotated[int | None, Field(ge=1, le=1_000_000_000)] = None
    """Take this many rows, drawn with the data seed; more than there are repeats them."""


DataParts = Annotated[list[DataPart], Field(max_length=32, json_schema_extra=LIST_ATOMIC)]


class Dataset(Model):
    """The rows, and how they become sequences of tokens."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.validationSplit) || !has(self.validation) || self.validation.size() == 0",
                "leave it out when validation is given: the rows come from one of them",
                field_path=".validationSplit",
            )
        )
    )

    train: Annotated[list[DataPart], Field(min_length=1, max_length=32, json_schema_extra=LIST_ATOMIC)]
    """Rows to learn from, all parts together."""
    validation: DataParts = Field(default_factory=list)
    """Rows to evaluate on."""
    validation_split: Annotated[float | None, Field(gt=0, le=0.5)] = None
    """Fraction of the training rows that is set aside for evaluation."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest sequence, in tokens."""
    truncation: Literal["auto", "delete", "left", "right", "split"] = "auto"
    """What becomes of a longer row: dropped and counted (delete), cut at one end, or cut into several (split, pretrain only). auto is split for pretrain, else delete."""
    loss: Literal["auto", "all", "assistant", "lastTurn"] = "auto"
    """Tokens that are learnt: every one, the assistant's answers, or the last answer. auto is all for pretrain, else assistant."""
    shuffle: bool = True
    """Shuffle the rows, anew each epoch."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of sampling, splitting and shuffling."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that tokenise."""


class Template(Model):
    """How a conversation becomes text. What is decided here is baked into the artifact."""

    chat_template: Annotated[str | None, Field(min_length=1, max_length=65536)] = None
    """Jinja chat template to use in place of the model's own."""
    system: Annotated[str | None, Field(max_length=16384)] = None
    """System prompt of conversations that bring none."""
    stop_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]],
        Field(max_length=8, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Further tokens that end an answer; each must be one token of the vocabulary."""


class Lora(Model):
    """A low-rank adapter on the linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.targetRegex) || !has(self.targetModules)",
                "leave it out when targetModules is given",
                field_path=".targetRegex",
            )
        )
    )

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Width r of the two factors. The adapter's size grows linearly with it; servers accept 8, 16, 32, 64, 128, 256, 320, 512 and round up to them."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32
    """Scale: the update is multiplied by alpha/rank, or alpha/sqrt(rank) with rsLora."""
    dropout: Fraction = 0.05
    """Dropout before the first factor."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]] | None,
        Field(min_length=1, max_length=64, json_schema_extra=LIST_ATOMIC),
    ] = None
    """Names of the modules to adapt, or all-linear, which is the default."""
    target_regex: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """A regular expression over full module names in place of targetModules."""
    rs_lora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapter (Liu et al. 2024, arXiv:2402.09353). Engines cannot serve it unmerged: merge it first."""
    modules_to_save: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=16, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Modules that are trained in full and saved with the adapter, for example embed_tokens and lm_head. Engines cannot serve it unmerged: merge it first."""
    init_weights: Literal["default", "gaussian"] = "default"
    """How the factors start."""


class Tuner(Model):
    """Which weights move."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.type) || self.type != 'full' || !has(self.lora)",
                "remove it, or set type: lora: full tuning has no adapter",
                field_path=".lora",
            )
        )
    )

    type: Literal["full", "lora"] | None = None
    """full moves every weight, lora trains an adapter. By default lora, and full for a model from scratch."""
    lora: Lora | None = None
    """The adapter, when type is lora."""


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
    max_steps: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    """Optimiser steps in all."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Rows in one forward pass of one process."""
    gradient_accumulation_steps: Annotated[int | None, Field(ge=1, le=65536)] = None
    """Forward passes to one optimiser step. By default enough for a global batch of at least 16 rows."""
    learning_rate: LearningRate | None = None
    """Peak learning rate. By default 1e-4 for LoRA, 1e-5 for full tuning, and 1e-3 falling to 3e-4 with size for a model from scratch."""
    scheduler: Scheduler = Field(default_factory=Scheduler)
    """How the learning rate moves."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """AdamW's decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1
    """Gradients are scaled down to this norm; 0 leaves them."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
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


class Distributed(Model):
    """Over how many processes the rows are spread."""

    nodes: Annotated[int, Field(ge=1, le=999)] = 1
    """Pods."""
    processes_per_node: Annotated[int | None, Field(ge=1, le=64)] = None
    """Processes in each pod. By default the number of nvidia.com/gpu in pod.resources.limits, or 1."""
    strategy: Literal["ddp"] = "ddp"
    """ddp: each process holds the whole model, gradients are averaged."""
    timeout_seconds: Annotated[int, Field(ge=30, le=86400)] = 1800
    """How long a collective operation may wait for the other processes, in seconds."""


class Output(Model):
    """Where checkpoints and the artifact go."""

    uri: S3Uri | None = None
    """s3://BUCKET/PREFIX; the job writes below PREFIX/NAMESPACE/NAME/UID. By default the installation's."""
    storage: Storage | None = None
    """How to reach it, when it differs from the resource's own `storage`."""


class Retries(Model):
    """How often a job is started again by itself."""

    limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Attempts after a failure that may pass by itself."""
    preemptions: Annotated[int, Field(ge=0, le=800)] = 100
    """Attempts after a preemption or a drained node; they do not count against limit."""


class FineTuneJobSpec(Model):
    """What to tune, on what, and how. method, model and dataset are enough for a sensible run."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.model.scratch) || !has(self.tuner.type) || self.tuner.type != 'lora'",
                "must be full, or left out: random weights have no base to adapt",
                field_path=".tuner.type",
            ),
            Rule(
                "!has(self.model.scratch) || !has(self.tuner.lora)",
                "remove it: random weights have no base to adapt",
                field_path=".tuner.lora",
            ),
            Rule(
                "!has(self.model.scratch) || self.dataset.maxLength <= self.model.scratch.maxLength",
                "must not exceed model.scratch.maxLength, the longest sequence that the model is made for",
                field_path=".dataset.maxLength",
            ),
            Rule(
                "self.method == 'pretrain' || !has(self.dataset.truncation) || self.dataset.truncation != 'split'",
                "split cuts answers from their questions: only pretrain takes it, choose delete, left or right",
                field_path=".dataset.truncation",
            ),
        )
    )

    method: Method
    """The tuning method. pretrain learns every token of text or conversations, sft learns the answers."""
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
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """What is kept so that a run can go on."""
    distributed: Distributed = Field(default_factory=Distributed)
    """Over how many processes the rows are spread."""
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
    """Longest time from the first start to the end, suspended time left out, in seconds."""
    hang_timeout_seconds: Annotated[int, Field(ge=60, le=604_800)] = 1800
    """A run that reports no step for this long, in seconds, is ended and started again from its checkpoint."""
    ttl_seconds_after_finished: Annotated[int | None, Field(ge=0, le=31_536_000)] = None
    """The resource is deleted this long after its end, in seconds. What it made in storage stays."""


class Attempt(Model):
    """One gang of pods, from start to end."""

    number: Annotated[int, Field(ge=1, le=999)]
    """Counts from 1."""
    start_time: Time
    """When its PyTorchJob was made."""
    end_time: Time | None = None
    """When it ended; absent while it runs."""
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
    tuner_type: Literal["full", "lora"]
    """Which weights move."""
    learning_rate: float
    """Peak learning rate."""
    truncation: Literal["delete", "left", "right", "split"]
    """What becomes of long rows."""
    loss: Literal["all", "assistant", "lastTurn"]
    """Tokens that are learnt."""
    processes_per_node: Annotated[int, Field(ge=1)]
    """Processes in each pod."""
    world_size: Annotated[int, Field(ge=1)]
    """Processes in all."""
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
    """Time spent suspended since the start, in seconds; the deadline leaves it out."""
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
    artifact: Artifact | None = None
    """What the job made."""


class FineTuneJob(Model):
    """Tunes a model on rows and publishes an adapter or a model in object storage."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra=rules(
            *(
                fixed_once_started(field)
                for field in (
                    "method", "model", "dataset", "template", "tuner", "training", "checkpoint", "distributed",
                    "output", "storage", "pod", "retries", "activeDeadlineSeconds", "hangTimeoutSeconds",
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
