"""MergeJob: one or more adapters folded into their base, shard by shard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    LIST_ATOMIC,
    Column,
    Model,
    ObjectMeta,
    Resource,
    Rule,
    fixed_once_started,
    list_map,
    rules,
)
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_api.v1alpha1.output import Output
from trimtab_api.v1alpha1.pod import Pod
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_api.v1alpha1.source import ModelSource, Storage
from trimtab_api.v1alpha1.status import Artifact, Condition, Message, PinnedInput, Time


class MergeAdapter(Model):
    """One adapter and its share."""

    from_: Annotated[ModelSource, Field(alias="from")]
    """Where the adapter comes from."""
    weight: Annotated[
        float,
        Field(
            ge=-16,
            le=16,
            json_schema_extra=rules(
                Rule("self != 0.0", "must not be 0: the adapter would change nothing; remove it from adapters instead")
            ),
        ),
    ] = 1
    """Factor of its update; 1 folds it in as it was trained."""


class Verification(Model):
    """The check that the merged model answers as base and adapter do together."""

    enabled: bool = True
    """Compare the logits of base and adapter with those of the merged model before publishing."""
    tolerance: Annotated[float | None, Field(gt=0, le=10)] = None
    """Largest difference of logits that is accepted; by default what the dtype's rounding explains."""


class Quantize(Model):
    """Smaller weights for serving, in the compressed-tensors layout that vLLM and transformers open."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!(self.scheme in ['gptq', 'awq']) || has(self.calibration)",
                "give rows that the model is used on: gptq and awq choose the weights by what goes through them",
                field_path=".calibration",
            ),
            Rule(
                "self.scheme in ['gptq', 'awq'] || !has(self.calibration)",
                "leave it out, or set scheme: gptq or awq: the other schemes look at no rows",
                field_path=".calibration",
            ),
            Rule(
                "!has(self.groupSize) || self.scheme in ['int4', 'gptq', 'awq']",
                "leave it out: fp8 and int8 have one scale for each output channel",
                field_path=".groupSize",
            ),
        )
    )

    scheme: Literal["fp8", "int8", "int4", "gptq", "awq"]
    """fp8: weights and activations in 8 bit floats, for GPUs since Ada. int8: both in 8 bit whole numbers. int4: weights in 4 bits, rounded to nearest. gptq (arXiv:2210.17323) and awq (arXiv:2306.00978): weights in 4 bits, chosen by calibration rows."""
    group_size: Literal[32, 64, 128] | None = None
    """Weights that share a scale, for the 4 bit schemes; by default 128. It must divide the width of the layers."""
    calibration: DataPart | None = None
    """Rows for gptq and awq, a few hundred of the kind that the model will see."""
    calibration_rows: Annotated[int, Field(ge=8, le=8192)] = 256
    """At most so many of them are looked at."""
    max_length: Annotated[int, Field(ge=16, le=131_072)] = 2048
    """Longest calibration row, in tokens; what is beyond is cut off."""
    keep: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=32, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Further modules that stay as they are, by name or as re:EXPRESSION. The head, the routers of experts and vision towers always do."""


class MergeJobSpec(Model):
    """What to fold into what."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "(has(self.adapters) && self.adapters.size() > 0) || (has(self.quantize) && has(self.base))",
                "give at least one adapter, or base and quantize to quantise a model as it is",
                field_path=".adapters",
            )
        )
    )

    adapters: Annotated[list[MergeAdapter], Field(max_length=8, json_schema_extra=LIST_ATOMIC)] = Field(
        default_factory=list
    )
    """The adapters; their updates add up. None quantises the base as it is."""
    base: ModelSource | None = None
    """The model to fold into; by default the one that the adapters were trained on."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the merged weights; auto is the base's."""
    max_shard_size: Annotated[
        str,
        Field(
            max_length=16,
            json_schema_extra=rules(
                Rule(r"self.matches('^[1-9][0-9]{0,4}(MB|GB)$')", "must be a size such as 500MB or 4GB")
            ),
        ),
    ] = "4GB"
    """Largest file of the merged model."""
    verify: Verification = Field(default_factory=Verification)
    """The check before publishing."""
    quantize: Quantize | None = None
    """Publish the result with quantised weights."""
    output: Output = Field(default_factory=Output)
    """Where the merged model goes."""
    storage: Storage | None = None
    """How to reach object storage, for every source and the output that do not say otherwise."""
    pod: Pod = Field(default_factory=Pod)
    """How the pod runs."""
    suspend: bool = False
    """true stops the work and keeps it stopped; false lets it go on."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Further pods after a failure that may pass by itself."""
    active_deadline_seconds: Annotated[int | None, Field(ge=1, le=31_536_000)] = None
    """Longest time from start to end, in seconds."""
    ttl_seconds_after_finished: Annotated[int | None, Field(ge=0, le=31_536_000)] = None
    """The resource is deleted this long after its end, in seconds. What it made in storage stays."""


class MergeProgress(Model):
    """How far the merge is."""

    shard: Annotated[int, Field(ge=0)] = 0
    """Shards written."""
    total_shards: Annotated[int, Field(ge=0)] = 0
    """Shards in all."""
    shards: Annotated[str, Field(max_length=32)] = ""
    """The two in one text, for the SHARD column: 3/14."""
    updated_time: Time | None = None
    """When the pod said so."""


class ResolvedMerge(Model):
    """What was left to Trimtab, as it was decided."""

    image: Annotated[str | None, Field(max_length=512)] = None
    """Trainer image, pinned at the start."""
    output_uri: Annotated[str | None, Field(max_length=1100)] = None
    """Prefix of everything that this job writes."""
    inputs: Annotated[list[PinnedInput], Field(max_length=16, json_schema_extra=list_map("field"))] = Field(
        default_factory=list
    )
    """The inputs as they were when the work began."""


class MergeJobStatus(Model):
    """What is known of the job."""

    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The generation of spec that this status is about."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """Observations; Succeeded leads."""
    start_time: Time | None = None
    """When a pod first got past its inputs; from then on spec is fixed."""
    completion_time: Time | None = None
    """When it ended."""
    attempt: Annotated[int, Field(ge=0, le=999)] = 0
    """Number of the newest attempt; looking again after a mistake in the inputs is no new one."""
    failures: Annotated[int, Field(ge=0, le=999)] = 0
    """Attempts that counted against retries."""
    preemptions: Annotated[int, Field(ge=0, le=999)] = 0
    """Attempts that ended because a pod was told to leave; they cost no retry."""
    attempts: Annotated[list[Attempt], Field(max_length=16, json_schema_extra=list_map("number"))] = Field(
        default_factory=list
    )
    """The newest attempts."""
    progress: MergeProgress | None = None
    """How far it is."""
    last_failure: Message | None = None
    """What the last failed pod said."""
    resolved: ResolvedMerge | None = None
    """What was left to Trimtab, as it was decided."""
    artifact: Artifact | None = None
    """The merged model."""


class MergeJob(Model):
    """Folds adapters into their base and publishes a whole model in object storage."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra=rules(
            *(
                fixed_once_started(field)
                for field in (
                    "adapters", "base", "dtype", "maxShardSize", "verify", "quantize", "output", "storage", "pod",
                    "retries", "activeDeadlineSeconds",
                )
            )
        ),
    )  # fmt: skip

    metadata: ObjectMeta
    spec: MergeJobSpec
    """What to fold into what."""
    status: MergeJobStatus | None = None
    """What is known of the job."""


MERGE_JOB = Resource(
    kind="MergeJob",
    plural="mergejobs",
    short_names=("mj",),
    model=MergeJob,
    columns=(
        Column(
            name="STATE",
            type="string",
            json_path='.status.conditions[?(@.type=="Succeeded")].reason',
            description="Reason of the condition Succeeded.",
        ),
        Column(
            name="SHARD",
            type="string",
            json_path=".status.progress.shards",
            description="Shards done and in all.",
        ),
        Column(
            name="ATTEMPT", type="integer", json_path=".status.attempt", description="Number of the newest attempt."
        ),
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
