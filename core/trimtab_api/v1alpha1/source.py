"""Where models and data come from and go to: the sources, and the object storage behind them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from trimtab_api.schema import Model, OneOf, Rule, rules

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
"""The identity of an artifact: sha256 over its manifest.json."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""Name of an object of somebody else's kind."""

OwnName = Annotated[str, Field(min_length=1, max_length=48, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
"""Name of an object of one of our kinds."""

S3Uri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(
            Rule(
                r"self.matches('^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$')",
                "must be s3://BUCKET/KEY, for example s3://models/llama",
            )
        ),
    ),
]

RelativePath = Annotated[
    str,
    Field(
        max_length=512,
        json_schema_extra=rules(
            Rule(
                "!self.startsWith('/') && !self.split('/').exists(part, part == '..')",
                "must be a path inside the volume: no leading slash, no '..'",
            )
        ),
    ),
]


class CaBundle(Model):
    """A ConfigMap key that holds PEM certificates to trust."""

    config_map_name: ObjectName
    """Name of the ConfigMap, in the namespace of the resource."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = "ca.crt"
    """Key within the ConfigMap."""


class PythonFile(Model):
    """A key of a ConfigMap that holds a file of Python."""

    name: ObjectName
    """Name of the ConfigMap, in the namespace of the resource."""
    key: Annotated[str, Field(min_length=4, max_length=253, pattern=r"^[a-zA-Z0-9_][-._a-zA-Z0-9]*\.py$")]
    """Key within the ConfigMap, a file's name that ends in .py."""


class Credentials(Model):
    """The Secret with the keys of an object storage."""

    secret_name: ObjectName
    """Secret in the namespace of the resource, with keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and, optionally, AWS_SESSION_TOKEN. Other keys are never mounted."""


class Storage(Model):
    """How to reach an S3-compatible object storage. What is left out comes from the installation's default."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.anonymous) || !self.anonymous || !has(self.credentials)",
                "leave it out, or set anonymous: false: unsigned requests use no keys",
                field_path=".credentials",
            )
        )
    )

    endpoint: Annotated[
        str | None,
        Field(
            max_length=512,
            json_schema_extra=rules(
                Rule(
                    r"self.matches('^https?://[^/@?#\\s]+/?$')",
                    "must be http://HOST:PORT or https://HOST:PORT; keys belong into the Secret that "
                    "storage.credentials names",
                )
            ),
        ),
    ] = None
    """URL of the server, for storage other than AWS S3."""
    region: Annotated[str | None, Field(max_length=64)] = None
    """Region, for example eu-central-1."""
    path_style: bool | None = None
    """Address buckets as http://host/bucket rather than http://bucket.host; most servers other than AWS want true."""
    anonymous: bool | None = None
    """Send unsigned requests, for public buckets."""
    verify_tls: Annotated[bool | None, Field(alias="verifyTLS")] = None
    """Check the server's certificate. Switch it off only to find a fault."""
    ca_bundle: CaBundle | None = None
    """Certificates to trust besides the system's, for a private authority."""
    credentials: Credentials | None = None
    """The Secret with the access keys. Without one the pod's ServiceAccount is asked (IRSA and its kin)."""


class S3Source(Model):
    """A prefix or an object in S3-compatible storage."""

    uri: S3Uri
    """s3://BUCKET/PREFIX of an artifact or a model folder, or s3://BUCKET/KEY of a data file."""
    storage: Storage | None = None
    """How to reach it, when it differs from the resource's own `storage`."""


HubRepo = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]


class HubModel(Model):
    """A model on the Hugging Face hub."""

    repo: HubRepo
    """OWNER/NAME of the repository."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit. A branch is pinned to its commit when the job starts."""


class HubData(Model):
    """A data set on the Hugging Face hub."""

    repo: HubRepo
    """OWNER/NAME of the repository."""
    subset: Annotated[str | None, Field(max_length=128)] = None
    """Configuration of the data set, when it has several."""
    split: Annotated[str, Field(min_length=1, max_length=128)] = "train"
    """Split to read."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit. A branch is pinned to its commit when the job starts."""


class VolumeSource(Model):
    """A path on a PersistentVolumeClaim."""

    claim_name: ObjectName
    """The claim, in the namespace of the resource."""
    path: RelativePath = ""
    """Path below the volume's root."""


class JobSource(Model):
    """Another resource of ours whose artifact is awaited and followed by digest."""

    name: OwnName
    """Name of the job, in the same namespace."""


class ModelSource(OneOf):
    """Where a model or an adapter comes from: exactly one member."""

    members: ClassVar[tuple[str, ...]] = ("s3", "huggingFace", "volume", "fineTuneJob", "mergeJob")

    s3: S3Source | None = None
    """A folder in object storage: an artifact of ours, or any folder in the transformers or PEFT layout."""
    hugging_face: HubModel | None = None
    """A repository on the Hugging Face hub."""
    volume: VolumeSource | None = None
    """A folder on a PersistentVolumeClaim."""
    fine_tune_job: JobSource | None = None
    """What a FineTuneJob of this namespace makes; the resource waits for it."""
    merge_job: JobSource | None = None
    """What a MergeJob of this namespace makes; the resource waits for it."""


class FolderSource(OneOf):
    """A folder of files that rows name: exactly one member."""

    members: ClassVar[tuple[str, ...]] = ("s3", "volume")

    s3: S3Source | None = None
    """A prefix in object storage."""
    volume: VolumeSource | None = None
    """A folder on a PersistentVolumeClaim."""


class DataSource(OneOf):
    """Where rows come from: exactly one member."""

    members: ClassVar[tuple[str, ...]] = ("s3", "huggingFace", "volume", "inline")

    s3: S3Source | None = None
    """A .jsonl, .json, .csv, .txt or .parquet object, or a prefix that holds such objects."""
    hugging_face: HubData | None = None
    """A data set on the Hugging Face hub."""
    volume: VolumeSource | None = None
    """A file or folder on a PersistentVolumeClaim."""
    inline: Annotated[str | None, Field(min_length=1, max_length=65536)] = None
    """JSON lines written here, for examples and identities: at most 64 KiB."""
