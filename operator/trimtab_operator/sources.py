"""Where inputs and outputs really are: unions, layers of storage and references, turned into places a pod can open.

Pure, and the same for all kinds: what a job refers to is looked up by observe and handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trimtab_api import inputs
from trimtab_api.conditions import SUCCEEDED, Reason
from trimtab_api.contract import (
    CA_ROOT,
    CODE_ROOT,
    CREDENTIALS_ROOT,
    VOLUMES_ROOT,
    CodeInput,
    Connection,
    DataInput,
    JobIdentity,
    ModelInput,
    S3Place,
    run_prefix,
)
from trimtab_api.v1alpha1 import FineTuneJob, MergeJob
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_api.v1alpha1.output import Output
from trimtab_api.v1alpha1.source import FolderSource, ModelSource, Storage, VolumeSource
from trimtab_api.v1alpha1.status import Artifact, ArtifactKind, TaskType

Producer = FineTuneJob | MergeJob
"""A resource that makes an artifact."""


@dataclass(frozen=True, order=True)
class Reference:
    """A resource of ours in the same namespace whose artifact is wanted."""

    kind: Literal["FineTuneJob", "MergeJob"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def logical(self) -> str:
        """How the contract writes it: fineTuneJob/NAME."""
        return f"{self.kind[0].lower()}{self.kind[1:]}/{self.name}"


Producers = Mapping[Reference, Producer | None]
"""What observe found under each reference; None when there is nothing of that name."""


@dataclass(frozen=True)
class Unmet:
    """Why a source cannot be opened yet: what a condition says."""

    reason: Reason
    message: str


def referenced(source: ModelSource) -> Reference | None:
    """The resource that a source names, if it names one."""
    if source.fine_tune_job is not None:
        return Reference("FineTuneJob", source.fine_tune_job.name)
    if source.merge_job is not None:
        return Reference("MergeJob", source.merge_job.name)
    return None


def connection(*layers: Storage | None) -> Connection:
    """How to reach a storage: each field from the first layer that gives it (source, resource, installation)."""
    ca = _first("ca_bundle", layers)
    credentials = _first("credentials", layers)
    anonymous = bool(_first("anonymous", layers))
    verify = _first("verify_tls", layers)
    return Connection(
        endpoint=_first("endpoint", layers),
        region=_first("region", layers),
        path_style=bool(_first("path_style", layers)),
        anonymous=anonymous,
        verify_tls=True if verify is None else verify,
        ca_file=f"{CA_ROOT}/{ca.config_map_name}/{ca.key}" if ca else None,
        credentials_dir=f"{CREDENTIALS_ROOT}/{credentials.secret_name}" if credentials and not anonymous else None,
    )


def _first(field: str, layers: tuple[Storage | None, ...]) -> Any:
    return next((value for layer in layers if layer and (value := getattr(layer, field)) is not None), None)


def volume_path(source: VolumeSource) -> str:
    """Where a pod finds what a source names on a claim."""
    return f"{VOLUMES_ROOT}/{source.claim_name}/{source.path}".rstrip("/")


def volume_reference(source: VolumeSource) -> str:
    """The same place without a pod's path."""
    return f"volume://{source.claim_name}/{source.path}".rstrip("/")


def model_input(
    field: str,
    source: ModelSource,
    wanted: tuple[ArtifactKind, ...],
    producers: Producers,
    storage: Storage | None,
    default: Storage | None,
    task: TaskType | None = None,
) -> ModelInput | Unmet:
    """The place of a model or adapter, or why it has none yet.

    `storage` is the resource's own, `default` the installation's. What a job made is reached as that job reached it.
    `task` is what it must do, where that matters.
    """
    if source.s3 is not None:
        place = S3Place(uri=source.s3.uri.rstrip("/"), connection=connection(source.s3.storage, storage, default))
        return ModelInput(field=field, reference=place.uri, s3=place)
    if source.hugging_face is not None:
        hub = source.hugging_face
        return ModelInput(field=field, reference=f"hf://{hub.repo}@{hub.revision}", hugging_face=hub)
    if source.volume is not None:
        return ModelInput(field=field, reference=volume_reference(source.volume), path=volume_path(source.volume))
    reference = referenced(source)
    assert reference is not None, "a source has exactly one member"
    artifact = artifact_of(field, reference, wanted, producers.get(reference), task)
    if isinstance(artifact, Unmet):
        return artifact
    producer = producers[reference]
    assert producer is not None, "only a producer has an artifact"
    return ModelInput(
        field=field,
        reference=reference.logical,
        s3=S3Place(uri=artifact.uri, connection=output_connection(producer, default), digest=artifact.digest),
    )


def data_input(field: str, part: DataPart, storage: Storage | None, default: Storage | None) -> DataInput:
    """The place of rows. `storage` is the resource's own, `default` the installation's."""
    source, media = part.from_, _folder(f"{field}.mediaFrom", part.media_from, storage, default)
    if source.s3 is not None:
        place = S3Place(uri=source.s3.uri, connection=connection(source.s3.storage, storage, default))
        return DataInput(field=field, part=part, s3=place, media=media)
    if source.volume is not None:
        return DataInput(field=field, part=part, path=volume_path(source.volume), media=media)
    return DataInput(field=field, part=part, hugging_face=source.hugging_face, inline=source.inline, media=media)


def _folder(
    field: str, source: FolderSource | None, storage: Storage | None, default: Storage | None
) -> ModelInput | None:
    if source is None:
        return None
    if source.s3 is not None:
        place = S3Place(uri=source.s3.uri, connection=connection(source.s3.storage, storage, default))
        return ModelInput(field=field, reference=place.uri, s3=place)
    assert source.volume is not None, "a source has exactly one member"
    return ModelInput(field=field, reference=volume_reference(source.volume), path=volume_path(source.volume))


def code_inputs(named: Iterable[inputs.Code], allowed: bool) -> list[CodeInput] | Unmet:
    """Where a pod finds the files of Python that a job names, or that the installation allows none."""
    found = list(named)
    if found and not allowed:
        return Unmet(
            Reason.SPEC_INVALID,
            f"{found[0].field} is code that would run in the trainer's pods, and this installation does not allow it. "
            "Use a reward by name or a reward model, or have the chart installed with rewards.python: true.",
        )
    return [
        CodeInput(field=each.field, reference=each.reference, path=f"{CODE_ROOT}/{each.file.name}/{each.file.key}")
        for each in found
    ]


def output_connection(producer: Producer, default: Storage | None) -> Connection:
    """How a job reaches its own output."""
    return connection(producer.spec.output.storage, producer.spec.storage, default)


def artifact_of(
    field: str,
    reference: Reference,
    wanted: tuple[ArtifactKind, ...],
    producer: Producer | None,
    task: TaskType | None = None,
) -> Artifact | Unmet:
    """What a job made, or why there is nothing to take. `task` None takes whatever it does."""
    if producer is None:
        return Unmet(
            Reason.WAITING, f"{field} names {reference}, which does not exist. Create it, or correct the name."
        )
    status = producer.status
    if status is None or status.artifact is None:
        state = next((each for each in status.conditions if each.type == SUCCEEDED), None) if status else None
        if state is not None and state.status == "False":
            return Unmet(
                Reason.REFERENCE_FAILED,
                f"{field} names {reference}, which ended without an artifact ({state.reason}: {state.message[:500]}). "
                "Mend that job and apply it again under its name; this resource goes on by itself.",
            )
        return Unmet(Reason.WAITING, f"{field} waits for {reference} ({state.reason if state else 'not begun'}).")
    if status.artifact.kind not in wanted:
        return Unmet(
            Reason.MODEL_INVALID,
            f"{field} names {reference}, which made {_article(status.artifact.kind)} "
            f"where {' or '.join(map(_article, wanted))} is needed. " + _remedy(status.artifact.kind, wanted),
        )
    if None not in (task, status.artifact.task_type) and status.artifact.task_type != task:
        return Unmet(
            Reason.MODEL_INVALID,
            f"{field} names {reference}, which {_DOES[status.artifact.task_type]}; "
            f"what {_DOES[task]} is needed. Name a job of another method.",
        )
    return status.artifact


_DOES: Mapping[TaskType | None, str] = {
    "CAUSAL_LM": "writes text",
    "SEQ_CLS": "gives scores",
    "FEATURE_EXTRACTION": "gives vectors",
}


def _article(kind: ArtifactKind) -> str:
    if kind == "predictions":
        return kind
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"


def _remedy(kind: ArtifactKind, wanted: tuple[ArtifactKind, ...]) -> str:
    if kind == "predictions":
        return "That job learns nothing and answers: name the one whose model it asks."
    if kind == "adapter":
        return "Name a job of full tuning, or fold the adapter into its base with a MergeJob and name that."
    if wanted == ("adapter",):
        return "Name a FineTuneJob with tuner.type lora."
    return "Name a job of another method."


def base_of(
    adapters: Mapping[str, Producer | None], producers: Producers, default: Storage | None
) -> ModelInput | Unmet | None:
    """The base that adapters were trained on, as the FineTuneJobs that made them tell it, by field of the adapter.

    None when none of them tells; Unmet when they name different ones.
    """
    told = {
        field: (producer, producer.status.artifact.base)
        for field, producer in adapters.items()
        if isinstance(producer, FineTuneJob) and producer.status and producer.status.artifact
        if producer.status.artifact.base is not None
    }
    digests = {field: base.digest for field, (_, base) in told.items() if base.digest is not None}
    if len(set(digests.values())) > 1:
        named = ", ".join(f"{field}: {digest}" for field, digest in sorted(digests.items()))
        return Unmet(
            Reason.BASE_MISMATCH,
            f"the adapters were trained on different bases ({named}). Merge adapters of one base alone.",
        )
    for producer, base in told.values():
        if base.uri.startswith("s3://"):
            place = S3Place(uri=base.uri, connection=base_connection(producer, producers, default), digest=base.digest)
            return ModelInput(field="base", reference=base.uri, s3=place)
    return None


def base_connection(adapter: FineTuneJob, producers: Producers, default: Storage | None) -> Connection:
    """How a FineTuneJob reached the model that it started from."""
    source = adapter.spec.model.from_
    if source is not None and source.s3 is not None:
        return connection(source.s3.storage, adapter.spec.storage, default)
    reference = referenced(source) if source is not None else None
    producer = producers.get(reference) if reference is not None else None
    return output_connection(producer or adapter, default)


def output_place(
    output: Output, storage: Storage | None, default: Storage | None, default_uri: str | None, job: JobIdentity
) -> S3Place | Unmet:
    """The prefix that belongs to one job alone, or that nobody says where results go."""
    uri = output.uri or default_uri
    if uri is None:
        return Unmet(
            Reason.OUTPUT_MISSING,
            "output.uri is not set and the installation has no default. Set it to s3://BUCKET/PREFIX, "
            "or install the chart with storage.output.",
        )
    return S3Place(uri=run_prefix(uri, job), connection=connection(output.storage, storage, default))
