"""ModelDeployment: a base and its adapters behind one OpenAI-compatible address."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import LIST_ATOMIC, Column, Model, ObjectMeta, Resource, Rule, Scale, list_map, rules
from trimtab_api.v1alpha1.pod import Pod
from trimtab_api.v1alpha1.source import Digest, ModelSource, Storage
from trimtab_api.v1alpha1.status import Condition, Message, Time

ServedName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$")]
"""The name that a client puts into `model`."""

LoraRank = Literal[8, 16, 32, 64, 128, 256, 320, 512]
"""Ranks that the engine can make room for."""


class ServedModel(Model):
    """The base."""

    from_: Annotated[ModelSource, Field(alias="from")]
    """Where it comes from."""
    name: ServedName | None = None
    """What clients call it; by default the name of the resource."""


class ServedAdapter(Model):
    """One adapter of the base."""

    name: ServedName
    """What clients call it."""
    from_: Annotated[ModelSource, Field(alias="from")]
    """Where it comes from."""


ALLOWED_ARGUMENTS = (
    "--block-size", "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prefix-caching",
    "--enforce-eager", "--kv-cache-dtype", "--max-logprobs", "--max-num-batched-tokens", "--max-num-seqs",
    "--no-enable-prefix-caching", "--reasoning-parser", "--seed", "--swap-space", "--tool-call-parser",
)  # fmt: skip
"""Engine arguments that a user may set. None of them loads code, opens a port or names a file."""


class Engine(Model):
    """How the engine runs."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights and arithmetic."""
    max_model_length: Annotated[int | None, Field(ge=16, le=10_485_760)] = None
    """Longest prompt and answer together, in tokens; by default the model's own limit."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Accelerators that share one copy of the model."""
    max_loras: Annotated[int | None, Field(ge=1, le=256)] = None
    """Adapters in one batch; by default as many as there are, at most 8, at least 2."""
    max_lora_rank: LoraRank | None = None
    """Room for adapters up to this rank; by default the next above the highest rank at the start, at least 16."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of an accelerator's memory that the engine takes."""
    extra_args: Annotated[
        list[
            Annotated[
                str,
                Field(
                    min_length=3,
                    max_length=256,
                    json_schema_extra=rules(
                        Rule(
                            f"self.split('=')[0] in {list(ALLOWED_ARGUMENTS)!r}",
                            "is not an allowed argument; write it as --name or --name=value with one of "
                            + ", ".join(ALLOWED_ARGUMENTS),
                        )
                    ),
                ),
            ]
        ],
        Field(max_length=32, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Further arguments of the engine, each --name or --name=value, from an allow-list."""


class ModelDeploymentSpec(Model):
    """What to serve."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.adapters) || "
                "self.adapters.all(one, self.adapters.exists_one(other, other.name == one.name))",
                "names two adapters alike: give each adapter a name of its own",
                field_path=".adapters",
            ),
            Rule(
                "!has(self.adapters) || !has(self.model.name) || "
                "!self.adapters.exists(adapter, adapter.name == self.model.name)",
                "names an adapter as the model is named: clients could not tell them apart",
                field_path=".adapters",
            ),
        )
    )

    model: ServedModel
    """The base."""
    adapters: Annotated[list[ServedAdapter], Field(max_length=64, json_schema_extra=list_map("name"))] = Field(
        default_factory=list
    )
    """Adapters of the base, each under its own name. They come and go without a restart."""
    replicas: Annotated[int, Field(ge=0, le=100)] = 1
    """Pods that serve."""
    engine: Engine = Field(default_factory=Engine)
    """How the engine runs."""
    storage: Storage | None = None
    """How to reach object storage, for every source that does not say otherwise."""
    pod: Pod = Field(default_factory=Pod)
    """How the pods run; resources are the engine's."""


class AdapterStatus(Model):
    """One adapter as the engines see it."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """What clients call it."""
    digest: Digest | None = None
    """Identity of what is served under the name."""
    ready_replicas: Annotated[int, Field(ge=0)] = 0
    """Pods whose engine answers for it."""
    reason: Annotated[str, Field(max_length=64)] = "Waiting"
    """Documented word: Loaded, Loading, or why not."""
    message: Message = ""
    """What is wrong and what to do."""


class ResolvedServing(Model):
    """What was left to Trimtab, as it was decided when the deployment started."""

    image: Annotated[str | None, Field(max_length=512)] = None
    """Server image."""
    model_name: Annotated[str, Field(max_length=63)]
    """What clients call the base."""
    model_uri: Annotated[str | None, Field(max_length=1100)] = None
    """Where the base stands."""
    model_digest: Digest | None = None
    """Identity of the base."""
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Room for adapters up to this rank; 0 when there is none."""
    max_loras: Annotated[int, Field(ge=0, le=256)] = 0
    """Adapters in one batch."""
    max_cpu_loras: Annotated[int, Field(ge=0, le=1024)] = 0
    """Adapters that the engine keeps in host memory."""


class ModelDeploymentStatus(Model):
    """What is known of the deployment."""

    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The generation of spec that this status is about."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """Observations; Ready leads, with Progressing and Degraded beside it."""
    start_time: Time | None = None
    """When its pods were first asked for."""
    replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Pods there are."""
    ready_replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Pods that answer."""
    ready: Annotated[str, Field(max_length=16)] = ""
    """The two in one text, for the READY column: 1/2."""
    selector: Annotated[str, Field(max_length=512)] = ""
    """Label selector of the pods, for autoscalers."""
    url: Annotated[str | None, Field(max_length=512)] = None
    """Base URL for OpenAI clients inside the cluster."""
    adapters: Annotated[list[AdapterStatus], Field(max_length=64, json_schema_extra=list_map("name"))] = Field(
        default_factory=list
    )
    """Each adapter as the engines see it."""
    adapters_ready: Annotated[str, Field(max_length=16)] = ""
    """Adapters that every ready pod serves, of all: 2/2."""
    resolved: ResolvedServing | None = None
    """What was left to Trimtab, as it was decided."""


class ModelDeployment(Model):
    """Serves a model and its adapters to OpenAI clients."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra=rules(
            # An unchanged spec passes, so that the rule never refuses a status write or a deletion.
            Rule(
                "oldSelf.hasValue() && oldSelf.value().spec == self.spec || has(self.spec.model.name) || "
                "!has(self.spec.adapters) || "
                "!self.spec.adapters.exists(adapter, adapter.name == self.metadata.name)",
                "names an adapter as the resource: without model.name the base is served under that name; "
                "set model.name",
                field_path=".spec.adapters",
                optional_old_self=True,
            )
        ),
    )

    metadata: ObjectMeta
    spec: ModelDeploymentSpec
    """What to serve."""
    status: ModelDeploymentStatus | None = None
    """What is known of the deployment."""


MODEL_DEPLOYMENT = Resource(
    kind="ModelDeployment",
    plural="modeldeployments",
    short_names=("mdep",),
    model=ModelDeployment,
    columns=(
        Column(
            name="STATE",
            type="string",
            json_path='.status.conditions[?(@.type=="Ready")].reason',
            description="Reason of the condition Ready.",
        ),
        Column(name="READY", type="string", json_path=".status.ready", description="Pods that answer, of all."),
        Column(
            name="ADAPTERS",
            type="string",
            json_path=".status.adaptersReady",
            description="Adapters that are served, of all.",
        ),
        Column(name="URL", type="string", json_path=".status.url", description="Address inside the cluster."),
        Column(
            name="AGE",
            type="date",
            json_path=".metadata.creationTimestamp",
            description="Time since creation.",
        ),
        Column(
            name="MESSAGE",
            type="string",
            json_path='.status.conditions[?(@.type=="Ready")].message',
            description="Message of the condition Ready.",
            priority=1,
        ),
    ),
    scale=Scale(spec_replicas=".spec.replicas", status_replicas=".status.replicas", label_selector=".status.selector"),
)
