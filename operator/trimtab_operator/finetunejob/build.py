"""What a FineTuneJob becomes: the preflight's Job, and for each attempt a PyTorchJob with its configuration.

Same input, same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from trimtab_api import inputs, names
from trimtab_api.contract import (
    METRICS_PORT,
    ROLLOUT_CONTAINER,
    ROLLOUT_ROOT,
    RUN_FILE,
    TERMINATION_LOG,
    WORK_ROOT,
    DataInput,
    JobIdentity,
    ModelInput,
    OutputTarget,
    RunConfig,
    S3Place,
)
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_api.v1alpha1.progress import ResolvedFineTune
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_operator import pods, sources
from trimtab_operator.pods import Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producers, Unmet

CONTAINER = "pytorch"
"""The name that training-operator asks for."""
PREFLIGHT_CONTAINER = "preflight"
GRACE_SECONDS = 300
"""Time for a pod that is told to leave to save and upload a common step."""
PORT = 23456
"""Where the ranks meet."""
SHARED_MEMORY = "2Gi"

PREFLIGHTED = (
    "method", "model", "dataset", "template", "tuner", "training", "distributed", "grpo", "ppo", "gkd", "rollout",
    "classification", "embedding", "reranker", "storage", "output", "pod",
)  # fmt: skip
"""Parts of the spec that the preflight looks at: when one changes, it looks again."""

CONFIG = PurePosixPath(RUN_FILE)


# ------------------------------------------------------------ run.json


def run_config(
    job: FineTuneJob,
    settings: Settings,
    producers: Producers,
    attempt: int,
    image: str,
    pins: Sequence[PinnedInput] = (),
) -> RunConfig | Unmet:
    """Everything that the pods need to know, or why it cannot be told yet."""
    output = output_place(job, settings)
    if isinstance(output, Unmet):
        return output
    code = sources.code_inputs(inputs.code(job.spec), settings.rewards.python)
    if isinstance(code, Unmet):
        return code
    models: dict[str, ModelInput] = {}
    for named in inputs.named(job.spec):
        found = _pinned(pins, job, settings, _model(named, job, settings, producers), named.field)
        if isinstance(found, Unmet):
            return found
        models[named.field] = found
    return RunConfig(
        job=identity(job),
        attempt=attempt,
        spec=job.spec,
        resolved=resolved(job, image, settings.images.server, output.uri),
        model=models.pop(inputs.MODEL, None),
        tokenizer=models.pop(inputs.TOKENIZER, None),
        further=list(models.values()),
        code=code,
        train=[_data(f"dataset.train[{n}]", part, job, settings) for n, part in enumerate(job.spec.dataset.train)],
        validation=[
            _data(f"dataset.validation[{n}]", part, job, settings) for n, part in enumerate(job.spec.dataset.validation)
        ],
        output=OutputTarget(s3=output),
        progress_config_map=names.progress(job.metadata.name),
        pins=list(pins),
    )


def identity(job: FineTuneJob) -> JobIdentity:
    """Whose run it is."""
    return JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid)


def resolved(job: FineTuneJob, image: str, server: str, output: str) -> ResolvedFineTune:
    """What was left to us, decided; once the job has started, the batch as memory has allowed it.

    `server`: the image of an engine beside the trainer; once the job has started it keeps the one that it has.
    """
    fresh, known = resolve(job.spec, image=image, output_uri=output), job.status
    if job.spec.asks_vllm:
        fresh = fresh.model_copy(update={"rollout_image": server})
    if known is None or known.start_time is None or known.resolved is None:
        return fresh
    kept = ("per_device_batch_size", "gradient_accumulation_steps", "rollout_image")
    return fresh.model_copy(update={name: getattr(known.resolved, name) for name in kept})


def output_place(job: FineTuneJob, settings: Settings) -> S3Place | Unmet:
    """The prefix that belongs to this job alone. Once chosen it stays, whatever the installation's default."""
    spec, known = job.spec, job.status
    chosen = known.resolved.output_uri if known is not None and known.start_time and known.resolved else None
    if chosen is not None:
        return S3Place(uri=chosen, connection=sources.connection(spec.output.storage, spec.storage, settings.storage))
    return sources.output_place(spec.output, spec.storage, settings.storage, settings.output, identity(job))


def _model(named: inputs.Named, job: FineTuneJob, settings: Settings, producers: Producers) -> ModelInput | Unmet:
    return sources.model_input(named.field, named.source, named.kinds, producers, job.spec.storage, settings.storage)


def _pinned(
    pins: Sequence[PinnedInput], job: FineTuneJob, settings: Settings, found: ModelInput | Unmet, field: str
) -> ModelInput | Unmet:
    """What the first attempt took stays, though the job that made it may have been deleted or run again since."""
    pin = next((pin for pin in pins if pin.field == field and pin.uri.startswith("s3://")), None)
    if pin is None:
        return found
    if isinstance(found, Unmet):
        reached = sources.connection(job.spec.storage, settings.storage)
        return ModelInput(
            field=pin.field, reference=pin.uri, s3=S3Place(uri=pin.uri, connection=reached, digest=pin.digest)
        )
    if found.s3 is None:
        return found
    return found.model_copy(update={"s3": found.s3.model_copy(update={"uri": pin.uri, "digest": pin.digest})})


def _data(field: str, part: DataPart, job: FineTuneJob, settings: Settings) -> DataInput:
    return sources.data_input(field, part, job.spec.storage, settings.storage)


def places(config: RunConfig) -> list[pods.Place]:
    """Everything that the pods open."""
    opened: list[pods.Place] = [place for place in (config.model, config.tokenizer, *config.further) if place]
    output = [config.output.s3] if config.output.s3 is not None else []
    rows = [*config.train, *config.validation]
    media = [each.media for each in rows if each.media is not None]
    return [*opened, *rows, *media, *output]


def inputs_hash(config: RunConfig, failures: int = 0) -> str:
    """Identity of what a preflight looked at: spec and places, and how often the inputs failed since."""
    looked_at = {
        key: value for key, value in config.dump().items() if key not in ("resolved", "attempt", "pins", "spec")
    }
    looked_at["spec"] = {key: value for key, value in config.spec.dump().items() if key in PREFLIGHTED}
    looked_at["failures"] = failures
    return hashlib.sha256(json.dumps(looked_at, sort_keys=True).encode()).hexdigest()[:32]


# ------------------------------------------------------------ objects


def config_map(job: FineTuneJob, name: str, config: RunConfig) -> Object:
    """run.json as a ConfigMap."""
    text = json.dumps(config.dump(), sort_keys=True, ensure_ascii=False)
    return _object(job, "v1", "ConfigMap", name) | {"data": {CONFIG.name: text}}


def progress_map(job: FineTuneJob) -> Object:
    """Where rank 0 reports. Made once and empty; what stands in it is the trainer's."""
    return _object(job, "v1", "ConfigMap", names.progress(job.metadata.name))


def account(job: FineTuneJob) -> str:
    """The account of the pods."""
    return job.spec.pod.service_account_name or names.trainer_account(job.metadata.name)


def access(job: FineTuneJob) -> list[Object]:
    """The account, unless the user names one, and its right to report progress into one ConfigMap."""
    name = names.trainer_account(job.metadata.name)
    api = "rbac.authorization.k8s.io/v1"
    role = _object(job, api, "Role", name) | {
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["configmaps"],
                "resourceNames": [names.progress(job.metadata.name)],
                "verbs": ["get", "patch"],
            }
        ]
    }
    binding = _object(job, api, "RoleBinding", name) | {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account(job), "namespace": job.metadata.namespace}],
    }
    own = _object(job, "v1", "ServiceAccount", name) | {"automountServiceAccountToken": False}
    return [*([] if job.spec.pod.service_account_name else [own]), role, binding]


def preflight(job: FineTuneJob, config: RunConfig, settings: Settings, hashed: str) -> list[Object]:
    """The Job that looks at the inputs, and its run.json. One pod, tried once: looking again is decided outside."""
    name = names.preflight(job.metadata.name)
    made = _object(job, "batch/v1", "Job", name)
    made["metadata"]["annotations"] = {names.SPEC_HASH: hashed}
    pod = _pod(job, config, name, [])
    pod["serviceAccountName"] = job.spec.pod.service_account_name or "default"
    # It needs no accelerator, so it goes wherever there is room.
    for placed in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName"):
        pod.pop(placed, None)
    pod["containers"][0] |= {
        "name": PREFLIGHT_CONTAINER,
        "image": config.resolved.image,
        "command": ["python", "-m", "trimtab_trainer.preflight"],
        "resources": {key: value for key, value in settings.preflight.resources.dump().items() if value},
    }
    pod["containers"][0].pop("ports")
    pod |= pods.pull_secrets(settings.image_pull_secrets)
    made["spec"] = {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "template": {"metadata": {"labels": pods.labels(job, "preflight")}, "spec": pod},
    }
    return [config_map(job, name, config), made]


def run_map(job: FineTuneJob, config: RunConfig) -> Object:
    """The run.json of one attempt."""
    return config_map(job, names.run_config(job.metadata.name, config.attempt), config)


def attempt(job: FineTuneJob, config: RunConfig, settings: Settings) -> list[Object]:
    """All that one attempt needs beside its run.json, the PyTorchJob last."""
    return [*access(job), progress_map(job), pytorchjob(job, config, settings)]


def lasting(job: FineTuneJob, config: RunConfig) -> list[Object]:
    """What stands around a gang for as long as it runs: it is made again when it goes."""
    return [*access(job), progress_map(job), run_map(job, config)]


def pytorchjob(job: FineTuneJob, config: RunConfig, settings: Settings) -> Object:
    """The gang of one attempt.

    Never restarted by pod, no back-off of its own: an attempt ends as a whole. With cleanPodPolicy Running the pod that
    failed stays, with its code and its message, and the others are terminated.
    """
    made = _object(job, "kubeflow.org/v1", "PyTorchJob", names.pytorchjob(job.metadata.name, config.attempt))
    made["metadata"]["labels"][names.ATTEMPT] = str(config.attempt)
    if queue := job.metadata.labels.get(names.QUEUE):
        made["metadata"]["labels"][names.QUEUE] = queue
    replicas = {"Master": _replica(job, config, settings, 1, master=True)}
    if job.spec.distributed.nodes > 1:
        replicas["Worker"] = _replica(job, config, settings, job.spec.distributed.nodes - 1, master=False)
    made["spec"] = {
        "nprocPerNode": str(config.resolved.processes_per_node),
        "runPolicy": {"cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": replicas,
    }
    return made


def _replica(job: FineTuneJob, config: RunConfig, settings: Settings, count: int, master: bool) -> Object:
    pod = _pod(
        job, config, names.run_config(job.metadata.name, config.attempt), pods.claims(job.spec.pod.volumes).mounts
    )
    pod["volumes"] += pods.claims(job.spec.pod.volumes).volumes
    if job.spec.asks_vllm:
        _add_engine(pod, job, config)
    if master:
        keys = pods.trackers(job.spec.reports)
        pod["volumes"] += [pods.token_volume(), *keys.volumes]
        pod["containers"][0]["volumeMounts"] += [pods.token_mount(), *keys.mounts]
    pod |= pods.pull_secrets(settings.image_pull_secrets)
    return {
        "replicas": count,
        "restartPolicy": "Never",
        "template": {
            "metadata": {
                "labels": pods.labels(job, "trainer", config.attempt),
                "finalizers": [names.EVIDENCE_FINALIZER],
            },
            "spec": pod,
        },
    }


def _add_engine(pod: Object, job: FineTuneJob, config: RunConfig) -> None:
    """The engine that draws answers, as a sidecar: it is placed, counted and ended with the trainer of its pod.

    It reads the model where the trainer has put it, so it needs neither credentials nor a network.
    """
    asked = job.spec.rollout
    assert asked is not None
    claims = pods.storage(place for place in (config.model,) if place is not None and place.path)
    shared = {"name": ROLLOUT_CONTAINER, "mountPath": ROLLOUT_ROOT}
    pod["initContainers"] = [
        {
            "name": ROLLOUT_CONTAINER,
            "image": config.resolved.rollout_image,
            "restartPolicy": "Always",
            "command": ["python", "-m", "trimtab_server.rollout"],
            "args": [
                f"--tensor-parallel-size={asked.tensor_parallel}",
                f"--gpu-memory-utilization={asked.gpu_memory_utilization}",
            ],
            "resources": pods.amounts(asked.resources),
            "securityContext": pods.container_security(),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                shared,
                {"name": "work", "mountPath": WORK_ROOT, "readOnly": True},
                {"name": "rollout-tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of this container's own
                {"name": "rollout-shm", "mountPath": "/dev/shm"},  # noqa: S108 - memory that its processes share
                *claims.mounts,
            ],
        }
    ]
    pod["containers"][0]["volumeMounts"].append(shared)
    pod["volumes"] += [
        {"name": ROLLOUT_CONTAINER, "emptyDir": {}},
        {"name": "rollout-tmp", "emptyDir": {}},
        {"name": "rollout-shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
    ]


def _pod(job: FineTuneJob, config: RunConfig, config_name: str, extra: Sequence[Object]) -> Object:
    shape = job.spec.pod
    mounted = pods.together(pods.storage(places(config)), pods.code(config.code))
    return {
        "serviceAccountName": account(job),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": pods.pod_security(),
        **pods.placement(shape),
        "containers": [
            {
                "name": CONTAINER,
                "image": config.resolved.image,
                "command": ["python", "-m", "trimtab_trainer.launcher"],
                "env": pods.environment(shape, {"TRIMTAB_GRACE_SECONDS": str(GRACE_SECONDS)}),
                "ports": [
                    {"name": "pytorchjob-port", "containerPort": PORT},
                    {"name": "metrics", "containerPort": METRICS_PORT},
                ],
                "resources": pods.resources(shape),
                "securityContext": pods.container_security(),
                "terminationMessagePath": TERMINATION_LOG,
                "volumeMounts": [
                    {"name": "config", "mountPath": str(CONFIG.parent), "readOnly": True},
                    {"name": "work", "mountPath": WORK_ROOT},
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of this pod's own
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - memory that the ranks of a pod share
                    *mounted.mounts,
                    *extra,
                ],
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": config_name}},
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
            *mounted.volumes,
        ],
    }


def _object(job: FineTuneJob, api_version: str, kind: str, name: str) -> Object:
    return {"apiVersion": api_version, "kind": kind, "metadata": pods.metadata(job, name)}
