"""What a MergeJob becomes: one batch Job at a time, its configuration, and the right to report.

Same input, same bytes. The Job has the MergeJob's name and no number, and is deleted in the foreground before the next
one is made: so two pods never write into one prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from trimtab_api import names
from trimtab_api.contract import MERGE_FILE, TERMINATION_LOG, WORK_ROOT, MergeConfig, ModelInput
from trimtab_api.v1alpha1 import MergeJob
from trimtab_operator import pods
from trimtab_operator.plan import Object

ROLE = "merge"
CONTAINER = "merge"
CONFIG = PurePosixPath(MERGE_FILE)
GRACE_SECONDS = 60
"""Time for a pod that is told to leave to finish the shard that it uploads."""
DISRUPTED = "PodFailurePolicy"
"""Reason of a Job's Failed condition when its only rule matched: the pod was evicted, preempted or drained."""


@dataclass(frozen=True)
class Work:
    """All that the objects follow from."""

    job: MergeJob
    config: MergeConfig
    image: str
    pull_secrets: Sequence[str] = ()
    """Registry credentials of the installation."""

    @property
    def name(self) -> str:
        """The name that the Job and what belongs to it share."""
        return names.merge(self.job.metadata.name)

    @property
    def hash(self) -> str:
        """Identity of the inputs. The image is no part of it: an upgrade of the operator disturbs no running merge."""
        inputs = {"config": self.config.dump(), "pod": self.job.spec.pod.dump()}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def account_name(job: MergeJob) -> str:
    """The account that the pod runs as."""
    return job.spec.pod.service_account_name or names.merge(job.metadata.name)


def objects(work: Work) -> list[Object]:
    """What must stand before the Job is made, in the order of creation."""
    account = [] if work.job.spec.pod.service_account_name else [service_account(work.job)]
    return [*account, role(work.job), role_binding(work.job), report(work.job), config_map(work)]


def service_account(job: MergeJob) -> Object:
    """The account of the pod; none is made when the user names one."""
    return _object(job, "v1", "ServiceAccount", names.merge(job.metadata.name)) | {
        "automountServiceAccountToken": False
    }


def role(job: MergeJob) -> Object:
    """Report progress into one ConfigMap, nothing else."""
    return _object(job, "rbac.authorization.k8s.io/v1", "Role", names.merge(job.metadata.name)) | {
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["configmaps"],
                "resourceNames": [names.merge_report(job.metadata.name)],
                "verbs": ["get", "patch"],
            }
        ]
    }


def role_binding(job: MergeJob) -> Object:
    """Gives the role to the account of the pod."""
    name = names.merge(job.metadata.name)
    return _object(job, "rbac.authorization.k8s.io/v1", "RoleBinding", name) | {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account_name(job), "namespace": job.metadata.namespace}],
    }


def report(job: MergeJob) -> Object:
    """Where the pod reports progress. Made once and empty; what stands in it is the pod's."""
    return _object(job, "v1", "ConfigMap", names.merge_report(job.metadata.name))


def config_map(work: Work) -> Object:
    """merge.json. It is changed only while no Job stands."""
    text = json.dumps(work.config.dump(), sort_keys=True, ensure_ascii=False)
    made = _object(work.job, "v1", "ConfigMap", work.name) | {"data": {CONFIG.name: text}}
    made["metadata"]["annotations"] = {names.SPEC_HASH: work.hash}
    return made


def inputs(config: MergeConfig) -> list[ModelInput]:
    """Everything that the pod reads, for messages, pins and mounts."""
    return [*([config.base] if config.base else []), *(adapter.source for adapter in config.adapters)]


def job(work: Work, attempt: int) -> Object:
    """The Job of one attempt.

    It never makes a second pod by itself: what an ending means is decided by the operator, which counts in status. Its
    one rule makes a disruption visible in the Job, where it outlives the pod.
    """
    made = _object(work.job, "batch/v1", "Job", work.name, attempt)
    made["metadata"]["annotations"] = {names.SPEC_HASH: work.hash}
    if queue := work.job.metadata.labels.get(names.QUEUE):
        made["metadata"]["labels"] |= {names.QUEUE: queue}
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return made | {
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [disrupted]},
            "template": {
                "metadata": {"labels": pods.labels(work.job, ROLE, attempt)},
                "spec": _pod(work),
            },
        }
    }


def _pod(work: Work) -> Object:
    shape = work.job.spec.pod
    output = [work.config.output.s3] if work.config.output.s3 else []
    rows = [work.config.calibration] if work.config.calibration else []
    storage = pods.storage([*inputs(work.config), *rows, *output])
    claims = pods.claims(shape.volumes)
    return {
        "restartPolicy": "Never",
        "serviceAccountName": account_name(work.job),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": pods.pod_security(),
        **pods.placement(shape),
        **pods.pull_secrets(work.pull_secrets),
        "containers": [
            {
                "name": CONTAINER,
                "image": work.image,
                "command": ["python", "-m", "trimtab_trainer.merge"],
                "env": pods.environment(shape),
                "resources": pods.resources(shape),
                "securityContext": pods.container_security(),
                "terminationMessagePath": TERMINATION_LOG,
                "volumeMounts": [
                    {"name": "config", "mountPath": str(CONFIG.parent), "readOnly": True},
                    {"name": "work", "mountPath": WORK_ROOT},
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of this container's own
                    pods.token_mount(),
                    *storage.mounts,
                    *claims.mounts,
                ],
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": work.name}},
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            pods.token_volume(),
            *storage.volumes,
            *claims.volumes,
        ],
    }


def _object(job: MergeJob, api_version: str, kind: str, name: str, attempt: int | None = None) -> Object:
    return {"apiVersion": api_version, "kind": kind, "metadata": pods.metadata(job, name, attempt=attempt)}
