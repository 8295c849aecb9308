"""What every pod of ours shares: whose it is, what it may do, where it runs, and the files that are mounted into it.

Pure. The mounts follow from the places that a pod opens (contract.S3Place and paths below VOLUMES_ROOT), so that no
Secret, ConfigMap or claim is mounted that no field names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from trimtab_api import names
from trimtab_api.contract import (
    CA_ROOT,
    CODE_ROOT,
    CREDENTIAL_KEYS,
    CREDENTIALS_ROOT,
    MLFLOW_KEYS,
    OPTIONAL_CREDENTIAL_KEYS,
    TOKEN_ROOT,
    TRACKERS_ROOT,
    VOLUMES_ROOT,
    WANDB_KEYS,
    CodeInput,
    DataInput,
    ModelInput,
    S3Place,
)
from trimtab_api.schema import ObjectMeta
from trimtab_api.v1alpha1 import FineTuneJob, MergeJob, ModelDeployment
from trimtab_api.v1alpha1.pod import ClaimMount, Pod, ResourceAmounts
from trimtab_api.v1alpha1.reports import Reports

Object = dict[str, Any]
Owner = FineTuneJob | MergeJob | ModelDeployment
Place = ModelInput | DataInput | S3Place

USER = 1000
"""The user and group of our images."""
TOKEN_SECONDS = 3600
"""Life of a pod's token; the kubelet renews it."""


@dataclass(frozen=True)
class Mounted:
    """Volumes of a pod and where its containers see them."""

    volumes: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()


# ------------------------------------------------------------ whose it is


def labels(owner: Owner, role: str | None = None, attempt: int | None = None) -> dict[str, str]:
    """The labels of a child of this resource."""
    meta = owner.metadata
    return names.labels(type(owner).__name__, meta.name, meta.uid, role, attempt)


def metadata(owner: Owner, name: str, role: str | None = None, attempt: int | None = None) -> Object:
    """The metadata of a child: its name, its labels, and the owner with whom it goes."""
    return {
        "name": name,
        "namespace": owner.metadata.namespace,
        "labels": labels(owner, role, attempt),
        "ownerReferences": [owner_reference(type(owner).__name__, owner.metadata)],
    }


def owner_reference(kind: str, meta: ObjectMeta) -> Object:
    """The reference by which garbage collection finds a child."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": kind,
        "name": meta.name,
        "uid": meta.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


# ------------------------------------------------------------ what it may do


def pod_security() -> Object:
    """A pod that the restricted profile admits."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    """A container that the restricted profile admits, with a root that it cannot write."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def token_volume() -> Object:
    """A short-lived token of the pod's account, with what is needed to reach the API server."""
    return {
        "name": "token",
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
            ],
        },
    }


def token_mount() -> Object:
    """Where the token is seen."""
    return {"name": "token", "mountPath": TOKEN_ROOT, "readOnly": True}


# ------------------------------------------------------------ how it runs


def placement(shape: Pod) -> Object:
    """Where the pod may run; only what the user gave."""
    given = {
        "nodeSelector": dict(shape.node_selector) or None,
        "tolerations": [toleration.dump() for toleration in shape.tolerations] or None,
        "affinity": shape.affinity,
        "priorityClassName": shape.priority_class_name,
        "runtimeClassName": shape.runtime_class_name,
    }
    return {key: value for key, value in given.items() if value is not None}


def environment(shape: Pod, own: Mapping[str, str] | None = None) -> list[Object]:
    """Literal variables: ours, then the user's; of one name the user's."""
    merged = {**(own or {}), **{variable.name: variable.value for variable in shape.env}}
    return [{"name": name, "value": value} for name, value in merged.items()]


def resources(shape: Pod) -> Object:
    """Requests and limits of the main container, only those given."""
    return amounts(shape.resources)


def amounts(given: ResourceAmounts) -> Object:
    """Requests and limits, only those given."""
    return {key: value for key, value in given.dump().items() if value}


def pull_secrets(secrets: Sequence[str]) -> Object:
    """The registry credentials of the pod, if the installation has any."""
    return {"imagePullSecrets": [{"name": name} for name in secrets]} if secrets else {}


# ------------------------------------------------------------ what is mounted


def storage(places: Iterable[Place]) -> Mounted:
    """Credentials, certificates and claims of all these places, each once."""
    each = list(places)
    connections = [place.connection for place in map(_s3, each) if place is not None]
    paths = [place.path for place in each if not isinstance(place, S3Place) and place.path]
    return together(
        *(_credentials(folder) for folder in _distinct(c.credentials_dir for c in connections)),
        *(_certificates(file) for file in _distinct(c.ca_file for c in connections)),
        *(_claim(name) for name in _distinct(_claim_name(path) for path in paths)),
    )


def code(files: Iterable[CodeInput]) -> Mounted:
    """The named keys of ConfigMaps as files; all keys of one ConfigMap in one folder."""
    keys: dict[str, set[str]] = {}
    for each in files:
        config_map, key = PurePosixPath(each.path).relative_to(CODE_ROOT).parts
        keys.setdefault(config_map, set()).add(key)
    return together(*(_code(config_map, sorted(keys[config_map])) for config_map in sorted(keys)))


def trackers(reports: Reports) -> Mounted:
    """The keys of the experiment trackers, for the one pod that reports."""
    wandb, mlflow = reports.wandb, reports.mlflow
    return together(
        *([_tracker("wandb", wandb.credentials.secret_name, WANDB_KEYS, ())] if wandb else []),
        *(
            [_tracker("mlflow", mlflow.credentials.secret_name, (), MLFLOW_KEYS)]
            if mlflow and mlflow.credentials
            else []
        ),
    )


def _tracker(name: str, secret: str, keys: Sequence[str], optional: Sequence[str]) -> Mounted:
    volume = {"projected": {"defaultMode": 0o440, "sources": _keys(secret, keys, optional)}}
    return _mount(names.tracker_volume(name), volume, f"{TRACKERS_ROOT}/{name}", True)


def _keys(secret: str, required: Sequence[str], optional: Sequence[str]) -> list[Object]:
    """The documented keys of one Secret alone; a missing required key keeps the pod from starting."""
    sources: list[Object] = []
    if required:
        sources.append({"secret": {"name": secret, "items": [{"key": key, "path": key} for key in required]}})
    if optional:
        items = [{"key": key, "path": key} for key in optional]
        sources.append({"secret": {"name": secret, "items": items, "optional": True}})
    return sources


def claims(wanted: Iterable[ClaimMount]) -> Mounted:
    """The claims that the user asks to mount."""
    return together(
        *(
            _mount(
                _volume_name("user-claim", f"{each.claim_name}{each.mount_path}"),
                {"persistentVolumeClaim": {"claimName": each.claim_name, "readOnly": each.read_only}},
                each.mount_path,
                each.read_only,
            )
            for each in wanted
        )
    )


def together(*each: Mounted) -> Mounted:
    """All of these in one pod."""
    return Mounted(
        tuple(volume for one in each for volume in one.volumes),
        tuple(mount for one in each for mount in one.mounts),
    )


def _s3(place: Place) -> S3Place | None:
    return place if isinstance(place, S3Place) else place.s3


def _credentials(folder: str) -> Mounted:
    secret = PurePosixPath(folder).relative_to(CREDENTIALS_ROOT).parts[0]
    sources = _keys(secret, CREDENTIAL_KEYS, OPTIONAL_CREDENTIAL_KEYS)
    volume = {"projected": {"defaultMode": 0o440, "sources": sources}}
    return _mount(_volume_name("credentials", secret), volume, folder, True)


def _certificates(file: str) -> Mounted:
    config_map, key = PurePosixPath(file).relative_to(CA_ROOT).parts
    volume = {"configMap": {"name": config_map, "items": [{"key": key, "path": key}]}}
    return _mount(_volume_name("ca", f"{config_map}/{key}"), volume, str(PurePosixPath(file).parent), True)


def _code(config_map: str, keys: Sequence[str]) -> Mounted:
    volume = {"configMap": {"name": config_map, "items": [{"key": key, "path": key} for key in keys]}}
    return _mount(_volume_name("code", config_map), volume, f"{CODE_ROOT}/{config_map}", True)


def _claim(name: str) -> Mounted:
    volume = {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}
    return _mount(_volume_name("claim", name), volume, f"{VOLUMES_ROOT}/{name}", True)


def _claim_name(path: str) -> str | None:
    below = PurePosixPath(path)
    return below.relative_to(VOLUMES_ROOT).parts[0] if below.is_relative_to(VOLUMES_ROOT) else None


def _mount(name: str, volume: Object, at: str, read_only: bool) -> Mounted:
    return Mounted(({"name": name, **volume},), ({"name": name, "mountPath": at, "readOnly": read_only},))


def _volume_name(what: str, of: str) -> str:
    """A volume's name is a DNS label of at most 63 characters, which a Secret's need not be."""
    return f"{what}-{hashlib.sha256(of.encode()).hexdigest()[:10]}"


def _distinct(values: Iterable[str | None]) -> list[str]:
    return sorted({value for value in values if value})
