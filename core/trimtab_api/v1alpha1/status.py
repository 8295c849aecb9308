"""What the statuses of all kinds share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab_api.schema import Model
from trimtab_api.v1alpha1.source import Digest

Time = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]
"""A moment, RFC 3339 in UTC."""

MESSAGE_LIMIT = 2048
"""Longest message that enters a status, in characters."""

Message = Annotated[str, Field(max_length=MESSAGE_LIMIT)]


class Condition(Model):
    """One observation, in the form that all of Kubernetes shares."""

    type: Annotated[str, Field(min_length=1, max_length=64)]
    """What is observed."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z][A-Za-z0-9]*$")]
    """Why, as one documented word."""
    message: Message = ""
    """What is wrong, where, and what to do."""
    last_transition_time: Time
    """When the status last changed."""
    observed_generation: Annotated[int, Field(ge=0)] = 0
    """The generation of spec that this is about."""


class BaseReference(Model):
    """The model that an adapter was trained on."""

    uri: Annotated[str, Field(max_length=1100)]
    """Where the base stood when it was read: a logical reference, never a pod's path."""
    digest: Digest | None = None
    """Identity of the base, when it has a manifest."""


ArtifactKind = Literal["adapter", "model", "classifier", "embedder", "predictions"]
"""What a job makes: model is a language model, classifier gives scores (reward models and rerankers are such), embedder vectors; predictions are answers, of a job that learns nothing."""

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"]
"""What a model does, in peft's words."""


class Artifact(Model):
    """What a job made: a prefix in object storage with a manifest, told by its digest."""

    uri: Annotated[str, Field(max_length=1100)]
    """s3://BUCKET/PREFIX of the artifact."""
    digest: Digest
    """sha256 over its manifest.json."""
    kind: ArtifactKind
    """Whether it is an adapter on a base or a whole model, and what a whole model answers with."""
    task_type: TaskType | None = None
    """What the model does, an adapter's as well, in peft's words: CAUSAL_LM writes, SEQ_CLS gives scores, FEATURE_EXTRACTION vectors."""
    base: BaseReference | None = None
    """What the adapter belongs to; absent for a whole model."""
    dataset_digest: Digest | None = None
    """Identity of the rows it was trained on."""
    rank: Annotated[int | None, Field(ge=1, le=512)] = None
    """Rank of an adapter."""
    size_bytes: Annotated[int | None, Field(ge=0)] = None
    """Size of all files together, in bytes."""


class Predictions(Model):
    """What a model answered: JSON lines in object storage, with their scores beside them."""

    uri: Annotated[str, Field(max_length=1100)]
    """Prefix with a manifest; below it predictions.jsonl, one row a line, and metrics.json."""
    digest: Digest
    """sha256 over its manifest.json."""
    rows: Annotated[int, Field(ge=0)]
    """Rows that were answered."""


class PinnedInput(Model):
    """One input as it was when the work began; later changes of the source do not reach the job."""

    field: Annotated[str, Field(max_length=128)]
    """The field that named it, for example dataset.train[0]."""
    uri: Annotated[str, Field(max_length=1100)]
    """Where it stood."""
    digest: Digest | None = None
    """Its identity."""
