"""Every word that Trimtab says in a condition or an event, with what it means and what to do: the runbook's source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SUCCEEDED = "Succeeded"
"""Leads FineTuneJob and MergeJob: Unknown until the end, then True or False."""
READY = "Ready"
"""Leads ModelDeployment."""
PROGRESSING = "Progressing"
"""ModelDeployment: something asked for is not there yet and is being worked on."""
DEGRADED = "Degraded"
"""ModelDeployment: it serves, but not all that was asked for."""
INPUTS_SOUND = "InputsSound"
"""FineTuneJob: the preflight's verdict."""
SUSPENDED = "Suspended"
"""Jobs: stopped at the user's wish, or held by a queue."""


class Reason(StrEnum):
    """The documented words."""

    # On the way
    WAITING = "Waiting"
    CHECKING = "Checking"
    QUEUED = "Queued"
    PENDING = "Pending"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    INPUTS_SOUND = "InputsSound"

    # Inputs: mended by the user, checked again by itself
    REFERENCE_FAILED = "ReferenceFailed"
    SPEC_INVALID = "SpecInvalid"
    BUCKET_MISSING = "BucketMissing"
    OBJECT_MISSING = "ObjectMissing"
    CREDENTIALS_MISSING = "CredentialsMissing"
    CREDENTIALS_WRONG = "CredentialsWrong"
    STORAGE_UNREACHABLE = "StorageUnreachable"
    OUTPUT_MISSING = "OutputMissing"
    DATA_INVALID = "DataInvalid"
    DATA_EMPTY = "DataEmpty"
    MODEL_INVALID = "ModelInvalid"
    CHAT_TEMPLATE_MISSING = "ChatTemplateMissing"
    BASE_MISMATCH = "BaseMismatch"
    INPUT_CHANGED = "InputChanged"
    DIGEST_MISMATCH = "DigestMismatch"
    NOT_AN_ARTIFACT = "NotAnArtifact"
    NAME_CONFLICT = "NameConflict"

    # The cluster
    PODS_REFUSED = "PodsRefused"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    PREEMPTED = "Preempted"

    # Endings
    OUT_OF_MEMORY = "OutOfMemory"
    MEMORY_TOO_SMALL = "MemoryTooSmall"
    DISK_FULL = "DiskFull"
    STORAGE_FAILED = "StorageFailed"
    STALLED = "Stalled"
    ASSERTION_FAILED = "AssertionFailed"
    CRASHED = "Crashed"
    DEADLINE_EXCEEDED = "DeadlineExceeded"

    # Serving
    SERVING = "Serving"
    STARTING = "Starting"
    SCALED_TO_ZERO = "ScaledToZero"
    REPLICAS_UNAVAILABLE = "ReplicasUnavailable"
    ADAPTERS_FAILED = "AdaptersFailed"
    ENGINE_FAILED = "EngineFailed"
    LOADED = "Loaded"
    LOADING = "Loading"
    ADAPTER_RANK_TOO_LARGE = "AdapterRankTooLarge"
    ADAPTER_UNSUPPORTED = "AdapterUnsupported"
    UNSAFE_FORMAT = "UnsafeFormat"


@dataclass(frozen=True)
class Entry:
    """A line of the runbook."""

    meaning: str
    remedy: str


RUNBOOK: dict[Reason, Entry] = {
    Reason.WAITING: Entry(
        "A job that this one refers to has not finished, or does not exist yet.",
        "Nothing, when the job named in the message runs; else create it, or correct the name.",
    ),
    Reason.CHECKING: Entry(
        "A small pod without accelerators looks at sources, rows, model and tokenizer.",
        "Nothing; it takes seconds to minutes, by the size of the data.",
    ),
    Reason.QUEUED: Entry(
        "A queue such as Kueue holds the pods back, or took their place away; they come back within the same attempt.",
        "Nothing; `kubectl get workloads` tells the place in the queue. Its time counts against no deadline.",
    ),
    Reason.PENDING: Entry("The pods of an attempt are made but do not all run yet.", "Nothing, unless it lasts."),
    Reason.RUNNING: Entry("All pods run.", "Watch STEP, LOSS and ETA."),
    Reason.RESTARTING: Entry(
        "An attempt ended in a way that may pass; the next one starts from the newest complete checkpoint.",
        "Nothing; status.attempts tells how each one ended.",
    ),
    Reason.SUSPENDED: Entry("spec.suspend is true; no pod is held.", "Set spec.suspend to false to go on."),
    Reason.SUCCEEDED: Entry("The artifact is published; its digest stands in status.artifact.", "Nothing."),
    Reason.INPUTS_SOUND: Entry("The preflight found every input sound.", "Nothing."),
    Reason.REFERENCE_FAILED: Entry(
        "The job that this one refers to ended without an artifact.",
        "Mend and start that job again under its name; this one goes on by itself.",
    ),
    Reason.SPEC_INVALID: Entry(
        "The spec asks for something that cannot be, in a way that the API server could not see.",
        "Correct the field that the message names.",
    ),
    Reason.BUCKET_MISSING: Entry("The bucket does not exist.", "Create it, or correct the uri."),
    Reason.OBJECT_MISSING: Entry("The object or prefix does not exist.", "Upload it, or correct the uri."),
    Reason.CREDENTIALS_MISSING: Entry(
        "The Secret with the storage's keys, or one of its keys, is not in this namespace.",
        "Create the Secret that the message names with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    ),
    Reason.CREDENTIALS_WRONG: Entry(
        "The storage refused the keys, or the keys may not do this.",
        "Correct the Secret, or grant its owner the right that the message names.",
    ),
    Reason.STORAGE_UNREACHABLE: Entry(
        "The storage does not answer.", "Check storage.endpoint, network policies, and the server itself."
    ),
    Reason.OUTPUT_MISSING: Entry(
        "Neither spec.output.uri nor the installation says where results go.",
        "Set spec.output.uri, or install the chart with storage.output.",
    ),
    Reason.DATA_INVALID: Entry(
        "A row is broken; the message names source, row and reason.",
        "Correct the row; the job looks again by itself.",
    ),
    Reason.DATA_EMPTY: Entry("The data set has no usable row.", "Add rows, or raise dataset.maxLength."),
    Reason.MODEL_INVALID: Entry(
        "The model, tokenizer or adapter does not open, or does not fit what is asked of it.",
        "Correct the source that the message names.",
    ),
    Reason.CHAT_TEMPLATE_MISSING: Entry(
        "The rows are conversations and the tokenizer has no chat template.", "Set template.chatTemplate."
    ),
    Reason.BASE_MISMATCH: Entry(
        "The adapter was trained on another base.",
        "Name the base that the message gives, or another adapter.",
    ),
    Reason.INPUT_CHANGED: Entry(
        "An input is no longer what it was when the job began.",
        "Restore it, or delete the job and apply it again to take the new one.",
    ),
    Reason.DIGEST_MISMATCH: Entry(
        "A file is not what its manifest says.", "Publish the artifact again; nothing of it was used."
    ),
    Reason.NOT_AN_ARTIFACT: Entry(
        "The prefix has no manifest.json, so nothing says that it is complete.",
        "Point to an artifact, or wait for its upload.",
    ),
    Reason.NAME_CONFLICT: Entry(
        "An object of the name that Trimtab needs exists and belongs to someone else; it is left alone.",
        "Rename or delete that object, or apply the resource under another name.",
    ),
    Reason.PODS_REFUSED: Entry(
        "The API server or the training operator refuses to make the pods.",
        "Do what the quoted refusal asks for: quota, policy, or the field that it names.",
    ),
    Reason.UNSCHEDULABLE: Entry(
        "No node has room for a pod or bears its labels.",
        "Lower pod.resources, correct nodeSelector or tolerations, or add nodes.",
    ),
    Reason.IMAGE_UNAVAILABLE: Entry(
        "A node cannot pull the image.", "Check the image's name and the registry's credentials on the nodes."
    ),
    Reason.VOLUME_UNAVAILABLE: Entry(
        "A volume cannot be mounted.", "Create the claim, ConfigMap or Secret that the message names."
    ),
    Reason.PREEMPTED: Entry(
        "The pods were told to leave; a common step was saved.", "Nothing; the next attempt goes on from it."
    ),
    Reason.OUT_OF_MEMORY: Entry(
        "Memory of the accelerator or of the pod ran out. A FineTuneJob goes on with half as many rows in a pass and "
        "the same global batch, as long as they can be halved.",
        "When it ends so: lower training.perDeviceBatchSize or dataset.maxLength, or raise pod.resources.",
    ),
    Reason.MEMORY_TOO_SMALL: Entry(
        "The run would need more memory than the device or the pod has; nothing was started.",
        "Make one of the changes that the message lists, or take larger devices.",
    ),
    Reason.DISK_FULL: Entry("The pod's scratch space ran out.", "Raise ephemeral-storage, or free the node's disk."),
    Reason.STORAGE_FAILED: Entry(
        "The storage stopped answering for longer than a run may wait.",
        "Mend the storage; completed steps are kept.",
    ),
    Reason.STALLED: Entry(
        "No step was reported within hangTimeoutSeconds, or a collective operation timed out.",
        "See the pods' logs for the rank that stopped; raise the limit when steps are long.",
    ),
    Reason.ASSERTION_FAILED: Entry(
        "The run found its own result wrong: a loss that is not finite, weights that did not move, logits that differ.",
        "Do what the message says, usually a lower learning rate.",
    ),
    Reason.CRASHED: Entry("The process ended in a way that nobody foresaw.", "Read the pod's log."),
    Reason.DEADLINE_EXCEEDED: Entry(
        "activeDeadlineSeconds passed.",
        "Raise it and apply the job again; its checkpoints are listed in status.",
    ),
    Reason.SERVING: Entry("Every pod that was asked for answers, with every adapter.", "Nothing."),
    Reason.STARTING: Entry("The first pods fetch the model and start their engine.", "Nothing, unless it lasts."),
    Reason.SCALED_TO_ZERO: Entry("spec.replicas is 0.", "Raise spec.replicas to serve."),
    Reason.REPLICAS_UNAVAILABLE: Entry(
        "Fewer pods answer than were asked for.", "See the pods' conditions and the agents' messages."
    ),
    Reason.ADAPTERS_FAILED: Entry(
        "The base is served, some adapters are not.", "status.adapters tells which, why, and what to do."
    ),
    Reason.ENGINE_FAILED: Entry(
        "The engine ends again and again, or the one that draws a trainer's answers ended, or does not answer.",
        "Read the log of the container engine; in a trainer's pod it is called rollout.",
    ),
    Reason.LOADED: Entry("The adapter answers.", "Nothing."),
    Reason.LOADING: Entry("The adapter is being fetched or loaded.", "Nothing, unless it lasts."),
    Reason.ADAPTER_RANK_TOO_LARGE: Entry(
        "The adapter's rank exceeds the room that the engine was started with.",
        "Set engine.maxLoraRank to at least the rank; the pods are then replaced.",
    ),
    Reason.ADAPTER_UNSUPPORTED: Entry(
        "The engine cannot serve this adapter unmerged (DoRA, modulesToSave, bias, other modules).",
        "Fold it into its base with a MergeJob and serve the result.",
    ),
    Reason.UNSAFE_FORMAT: Entry(
        "The weights are pickled, which can run code when read.",
        "Save them as safetensors and publish again.",
    ),
}
