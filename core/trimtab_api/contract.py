"""What crosses a pod's wall: one set of models for the side that writes and the side that reads.

In: run.json (RunConfig), merge.json (MergeConfig), serve.json (ServeConfig), each from a ConfigMap. Out while running:
progress.json and AgentReport. Out at the end: the termination message (Ending) and an exit code from the table.
In storage: the manifest, and the layout below an output prefix.
"""

from __future__ import annotations

import hashlib
import json
from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from trimtab_api.conditions import Reason
from trimtab_api.schema import Model
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.mergejob import MergeJobSpec, MergeProgress
from trimtab_api.v1alpha1.progress import Memory, Progress, ResolvedFineTune
from trimtab_api.v1alpha1.source import Digest, HubData, HubModel
from trimtab_api.v1alpha1.status import Artifact, PinnedInput, Predictions

# Paths inside our containers
RUN_FILE = "/var/run/trimtab/config/run.json"
MERGE_FILE = "/var/run/trimtab/config/merge.json"
CREDENTIALS_ROOT = "/var/run/trimtab/credentials"
"""Below it one folder per Secret, holding the documented keys alone."""
TRACKERS_ROOT = "/var/run/trimtab/trackers"
"""Below it one folder per experiment tracker, holding its keys."""
CA_ROOT = "/var/run/trimtab/ca"
"""Below it one folder per ConfigMap."""
VOLUMES_ROOT = "/var/run/trimtab/volumes"
"""Below it one mount per PersistentVolumeClaim that a source names."""
CODE_ROOT = "/var/run/trimtab/code"
"""Below it one folder per ConfigMap, holding the files of Python that fields name."""
TOKEN_ROOT = "/var/run/trimtab/token"  # noqa: S105 - a path
"""Projected ServiceAccount token, ca.crt and namespace of the pods that may report."""
ROLLOUT_ROOT = "/var/run/trimtab/rollout"
"""What a trainer and the engine beside it share: the word on the model, and the adapters."""
WORK_ROOT = "/work"
"""Writable scratch space of a pod."""
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LIMIT = 4096
"""Longest termination message, in bytes, as the kubelet cuts it."""

CREDENTIAL_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OPTIONAL_CREDENTIAL_KEYS = ("AWS_SESSION_TOKEN",)
WANDB_KEYS = ("WANDB_API_KEY",)
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""All optional: a server asks for a name and a word, for a token, or for nothing."""

PROGRESS_KEY = "progress.json"
"""Key of the progress ConfigMap."""
SERVE_KEY = "serve.json"
"""Key of a deployment's desired ConfigMap."""

AGENT_PORT = 8000
"""Where the Service reaches the agent."""
ENGINE_PORT = 8001
"""Where the agent reaches the engine, on 127.0.0.1 alone."""
METRICS_PORT = 9090
"""Prometheus metrics of trainer pods."""


class Exit(IntEnum):
    """Exit codes of our containers; the operator classifies by them first."""

    OK = 0
    CRASHED = 1
    """Anything that nobody foresaw."""
    SPEC_INVALID = 64
    """The spec asks for what cannot be."""
    DATA_INVALID = 65
    """Rows are missing or broken."""
    MODEL_INVALID = 66
    """Model, tokenizer or adapter does not open or fit."""
    OUT_OF_MEMORY = 69
    """Memory of the device or the pod ran out."""
    ASSERTION_FAILED = 70
    """A check of the run itself failed: a loss that is not finite, an adapter without effect, logits that differ."""
    STORAGE_FAILED = 74
    """Object storage refused or did not answer within its deadline."""
    STALLED = 75
    """A collective operation timed out: another rank is gone or hangs."""
    PREEMPTED = 76
    """SIGTERM came; a common step was saved; steps remain."""
    CREDENTIALS = 77
    """Credentials are missing or wrong."""
    DISK_FULL = 78
    """The scratch space is too small."""


RETRIABLE = frozenset({Exit.CRASHED, Exit.OUT_OF_MEMORY, Exit.STORAGE_FAILED, Exit.STALLED, Exit.PREEMPTED})
"""Endings after which another attempt may go better. OUT_OF_MEMORY counts, because the node may have been shared."""


class Connection(Model):
    """How to reach an object storage, with every default filled in and every file a path in this pod."""

    endpoint: str | None = None
    """URL of the server; None for AWS S3."""
    region: str | None = None
    """Region."""
    path_style: bool = False
    """Address buckets by path."""
    anonymous: bool = False
    """Send unsigned requests."""
    verify_tls: Annotated[bool, Field(alias="verifyTLS")] = True
    """Check the server's certificate."""
    ca_file: str | None = None
    """PEM file of certificates to trust besides the system's."""
    credentials_dir: str | None = None
    """Folder with one file per key; None asks the pod's ServiceAccount."""


class S3Place(Model):
    """A prefix or object, how to reach it, and what it must be."""

    uri: str
    """s3://BUCKET/KEY."""
    connection: Connection = Field(default_factory=Connection)
    """How to reach it."""
    digest: Digest | None = None
    """Expected manifest digest; None takes what is there and pins it."""


class ModelInput(Model):
    """A model or adapter to read: exactly one of s3, hugging_face and path."""

    field: str
    """The field of the spec that named it, for messages."""
    reference: str
    """Logical reference for args.json: s3://..., hf://REPO@REV, volume://CLAIM/PATH, fineTuneJob/NAME."""
    s3: S3Place | None = None
    """In object storage."""
    hugging_face: HubModel | None = None
    """On the hub."""
    path: str | None = None
    """In this pod's file system."""


class DataInput(Model):
    """One source of rows to read: exactly one of s3, hugging_face, path and inline."""

    field: str
    """The field of the spec that named it, for messages: dataset.train[0]."""
    part: DataPart
    """Format, columns and sample as the spec has them."""
    s3: S3Place | None = None
    """In object storage."""
    hugging_face: HubData | None = None
    """On the hub."""
    path: str | None = None
    """In this pod's file system."""
    inline: str | None = None
    """JSON lines."""
    media: ModelInput | None = None
    """Folder in which the paths of images begin; None for the one that the data file lies in."""


class CodeInput(Model):
    """A file of the user's Python."""

    field: str
    """The field of the spec that named it, for messages: grpo.rewards[0].python."""
    reference: str
    """Logical reference: configMap://NAME/KEY."""
    path: str
    """In this pod's file system."""


class OutputTarget(Model):
    """Where results go: a prefix in object storage, or a folder when there is no cluster."""

    s3: S3Place | None = None
    """Prefix that belongs to this run alone; see layout()."""
    path: str | None = None
    """Folder with the same layout."""


class JobIdentity(Model):
    """Whose run it is."""

    namespace: str
    """Namespace of the resource."""
    name: str
    """Name of the resource."""
    uid: str
    """UID of the resource; a job applied again has another and inherits nothing."""


class RunConfig(Model):
    """run.json: everything that a trainer pod needs to know."""

    job: JobIdentity
    """Whose run it is."""
    attempt: Annotated[int, Field(ge=0)]
    """Number of the attempt; 0 for the preflight."""
    spec: FineTuneJobSpec
    """The spec as the user wrote it, defaults filled in."""
    resolved: ResolvedFineTune
    """What was left to us."""
    model: ModelInput | None = None
    """The model to start from; None for one from scratch."""
    tokenizer: ModelInput | None = None
    """The tokenizer of a scratch model that takes one."""
    further: list[ModelInput] = Field(default_factory=list, max_length=16)
    """The models beside the one that is tuned, told apart by their field; see inputs.further()."""
    code: list[CodeInput] = Field(default_factory=list, max_length=16)
    """Files of the user's Python, told apart by their field; see inputs.code()."""
    train: list[DataInput]
    """Rows to learn from."""
    validation: list[DataInput] = Field(default_factory=list)
    """Rows to evaluate on."""
    output: OutputTarget
    """Where results go."""
    progress_config_map: str | None = None
    """ConfigMap to report into; None without a cluster."""
    pins: list[PinnedInput] = Field(default_factory=list)
    """Inputs as the first attempt found them; empty in the preflight."""


class RolloutBase(Model):
    """base.json below ROLLOUT_ROOT: what the trainer tells the engine beside it, once it has the model."""

    path: Annotated[str, Field(min_length=1)]
    """Folder of the model, the same in both containers."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """The trainer's arithmetic."""
    max_model_len: Annotated[int, Field(ge=1)]
    """Tokens of prompt and answer together."""
    max_lora_rank: Annotated[int, Field(ge=0)]
    """Rank of the adapter; 0 when all weights are handed over."""


class RolloutEnd(Model):
    """ended.json below ROLLOUT_ROOT: how an engine beside a trainer ended."""

    exit_code: int
    """Its exit code; 128 and the number of the signal that ended it."""


ROLLOUT_BASE = "base.json"
ROLLOUT_END = "ended.json"
ROLLOUT_MODEL = "base"
"""What the engine beside a trainer calls the model without an adapter."""
ROLLOUT_READ = "read_anew"
"""What its workers do when all weights are handed over: see trimtab_server.renewal."""
ROLLOUT_CONTAINER = "rollout"
"""The engine's container in a trainer's pod."""


class MergeAdapterInput(Model):
    """An adapter to fold in."""

    source: ModelInput
    """Where it is."""
    weight: float = 1
    """Factor of its update."""


class MergeConfig(Model):
    """merge.json: everything that a merge pod needs to know."""

    job: JobIdentity
    """Whose merge it is."""
    spec: MergeJobSpec
    """The spec as the user wrote it, defaults filled in."""
    base: ModelInput | None = None
    """The base; None reads it from the adapter's manifest, through the adapter's own connection."""
    adapters: list[MergeAdapterInput]
    """The adapters; none when the base is quantised as it is."""
    calibration: DataInput | None = None
    """Rows that a quantisation looks at."""
    output: OutputTarget
    """Where the merged model goes."""
    progress_config_map: str | None = None
    """ConfigMap to report into; None without a cluster."""


class Ending(Model):
    """The termination message: how a pod says what it did. No digest, no success."""

    reason: Reason
    """Documented word."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """What happened, where."""
    hint: Annotated[str, Field(max_length=1024)] = ""
    """What to do about it."""
    from_step: Annotated[int | None, Field(ge=0)] = None
    """Step that the run went on from."""
    step: Annotated[int | None, Field(ge=0)] = None
    """Last step done."""
    artifact: Artifact | None = None
    """What was published."""
    predictions: Predictions | None = None
    """What the tuned model answered."""
    pins: list[PinnedInput] = Field(default_factory=list)
    """Preflight: the inputs as they were found."""
    rows: Annotated[int | None, Field(ge=0)] = None
    """Preflight: sound rows."""
    dataset_digest: Digest | None = None
    """Preflight: identity of the rows."""
    memory: Memory | None = None
    """Preflight: what the run takes on one device."""

    def text(self) -> str:
        """The message as JSON of at most TERMINATION_LIMIT bytes; message and hint give way first."""
        whole = json.dumps(self.dump(), ensure_ascii=False, separators=(",", ":"))
        if len(whole.encode()) <= TERMINATION_LIMIT:
            return whole
        spare = self.model_copy(update={"message": self.message[:600], "hint": self.hint[:300], "pins": self.pins[:8]})
        return json.dumps(spare.dump(), ensure_ascii=True, separators=(",", ":"))[:TERMINATION_LIMIT]


class RankResult(Model):
    """What each rank leaves for the launcher, which writes the termination message and the exit code."""

    rank: Annotated[int, Field(ge=0)]
    """Global rank."""
    exit: Exit
    """Code the pod shall exit with."""
    ending: Ending
    """What to say."""


class ProgressReport(Model):
    """progress.json: what rank 0 writes into the progress ConfigMap, throttled."""

    attempt: Annotated[int, Field(ge=0)]
    """Attempt that it is about; a late report of an old attempt is passed over."""
    progress: Progress | None = None
    """How far the training is."""
    merge: MergeProgress | None = None
    """How far the merge is."""
    from_step: int | None = None
    """Step that the attempt went on from."""
    checkpoints: list[CheckpointReport] = Field(default_factory=list, max_length=16)
    """The newest complete checkpoints."""


class CheckpointReport(Model):
    """A checkpoint whose manifest is written."""

    step: Annotated[int, Field(ge=0)]
    """Its step."""
    uri: Annotated[str, Field(max_length=1100)]
    """Its prefix."""
    digest: Digest
    """Identity of its manifest."""


class ServeModel(Model):
    """The base that a pod serves."""

    name: str
    """What clients call it."""
    source: ModelInput
    """Where it is, with its digest when it has one."""


class ServeAdapter(Model):
    """An adapter that a pod shall serve."""

    name: str
    """What clients call it."""
    source: ModelInput
    """Where it is; s3.digest is the version wanted."""


class ServeConfig(Model):
    """serve.json: what the agents of a deployment shall serve. Changing its adapters restarts nothing."""

    model: ServeModel
    """The base."""
    adapters: list[ServeAdapter] = Field(default_factory=list)
    """The adapters whose source is known."""
    max_lora_rank: int = 0
    """Room in the engine for adapters up to this rank; 0 switches adapters off."""


class AgentAdapter(Model):
    """One adapter in one pod."""

    name: str
    """What clients call it."""
    digest: Digest | None = None
    """What answers under the name now."""
    reason: Reason
    """Loaded, Loading, or why not."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """What is wrong and what to do."""


class AgentReport(Model):
    """What an agent says of its pod, as one key of the reports ConfigMap named after the pod."""

    pod_uid: str
    """UID of the pod, so that a namesake's old report is not believed."""
    model_ready: bool
    """The engine answers for the base."""
    model_digest: Digest | None = None
    """Identity of the base that is loaded."""
    reason: Reason
    """Serving, or what the pod is waiting for."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """What is wrong and what to do."""
    adapters: list[AgentAdapter] = Field(default_factory=list, max_length=64)
    """The adapters."""
    engine_started: str | None = None
    """Start of the engine process that this is about."""


class ManifestFile(Model):
    """One file of an artifact."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Path below the prefix, with forward slashes."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of the content."""


MANIFEST_NAME = "manifest.json"


class Manifest(Model):
    """manifest.json, written last: a prefix without it does not exist."""

    format: Literal[1] = 1
    """Version of this layout."""
    files: list[ManifestFile]
    """Every file but the manifest itself, by path."""
    made_by: dict[str, Any] = Field(default_factory=dict)
    """What made it: spec, base and dataset digests, step, versions."""

    def encoded(self) -> bytes:
        """The bytes of manifest.json: canonical, so that one content has one digest."""
        return json.dumps(self.dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        """Identity of the artifact: sha256 over the manifest's bytes."""
        return "sha256:" + hashlib.sha256(self.encoded()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


class Layout(Model):
    """Where things lie below the output prefix of one run."""

    prefix: str
    """The prefix, without a slash at its end."""

    @property
    def artifact(self) -> str:
        """The adapter or model."""
        return f"{self.prefix}/artifact"

    @property
    def tokenizer(self) -> str:
        """The tokenizer that a scratch model learnt before step 0."""
        return f"{self.prefix}/tokenizer"

    @property
    def start(self) -> str:
        """The factors that an adapter began with, where they were taken out of the base."""
        return f"{self.prefix}/start"

    def sequences(self, key: str, shared: bool) -> str:
        """Tokenised rows: below this prefix, or beside those of all jobs of the namespace; see run_prefix()."""
        root = self.prefix.rsplit("/", 2)[0] if shared else self.prefix
        return f"{root}/sequences/{key}"

    @property
    def checkpoints(self) -> str:
        """Below it one prefix per step."""
        return f"{self.prefix}/checkpoints"

    @property
    def report(self) -> str:
        """Loss curve and TensorBoard events."""
        return f"{self.prefix}/report"

    def predictions(self, step: int) -> str:
        """What the model answered after this step: 0 before the training."""
        return f"{self.prefix}/predictions/{step:09d}"

    def checkpoint(self, step: int) -> str:
        """The checkpoint of one step; padded, so that listing is in order."""
        return f"{self.checkpoints}/{step:09d}"


def run_prefix(output: str, job: JobIdentity) -> str:
    """The prefix that belongs to one resource for all time: OUTPUT/NAMESPACE/NAME/UID."""
    return f"{output.rstrip('/')}/{job.namespace}/{job.name}/{job.uid}"


ProgressReport.model_rebuild()
