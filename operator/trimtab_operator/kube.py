"""The only room that talks to the API server. Its errors are turned into ours here and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import incluster_config, kube_config

from trimtab_api import names
from trimtab_api.v1alpha1 import RESOURCES
from trimtab_operator.plan import Event, Object, Ref

TIMEOUT_SECONDS = 20.0
"""Longest wait for one answer of the API server."""
PAGE = 500
"""Objects in one answer to a list."""

WHOLE = "application/json"
METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
MERGE = "application/merge-patch+json"


class KubeError(Exception):
    """The API server did not do what it was asked; the message says what, on which object, and why."""


class Unavailable(KubeError):
    """The API server did not answer, or said that it cannot just now. Trying again may help."""


class Stale(KubeError):
    """The object changed since it was read. Looking again helps."""


class Refused(KubeError):
    """The API server will not do this: policy, quota, rights, or a wrong field. Only a change helps."""


class NameConflict(KubeError):
    """An object of this name exists and is not ours; it is left alone."""

    def __init__(self, made: Object) -> None:
        meta = made["metadata"]
        super().__init__(
            f"{made['kind']} {meta['name']} exists in namespace {meta['namespace']} and belongs to someone else; "
            "rename or delete it, or apply this resource under another name"
        )


@dataclass(frozen=True)
class Endpoint:
    """Where a kind lives."""

    prefix: str
    plural: str


ENDPOINTS: Mapping[str, Endpoint] = {
    "Pod": Endpoint("/api/v1", "pods"),
    "Service": Endpoint("/api/v1", "services"),
    "ServiceAccount": Endpoint("/api/v1", "serviceaccounts"),
    "ConfigMap": Endpoint("/api/v1", "configmaps"),
    "Event": Endpoint("/api/v1", "events"),
    "Job": Endpoint("/apis/batch/v1", "jobs"),
    "Deployment": Endpoint("/apis/apps/v1", "deployments"),
    "ReplicaSet": Endpoint("/apis/apps/v1", "replicasets"),
    "PyTorchJob": Endpoint("/apis/kubeflow.org/v1", "pytorchjobs"),
    "Role": Endpoint("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Endpoint("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "NetworkPolicy": Endpoint("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": Endpoint("/apis/policy/v1", "poddisruptionbudgets"),
    **{each.kind: Endpoint(f"/apis/{names.API_VERSION}", each.plural) for each in RESOURCES},
}


Objects = list[Object]


class Reader(Protocol):
    """What observe reads from: the API server itself, or a survey of it."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None when there is none."""

    async def list(self, kind: str, namespace: str | None, labels: str = "", fields: str = "") -> Objects:
        """All objects that match."""

    async def metadata(self, kind: str, namespace: str | None, labels: str = "") -> Objects:
        """All objects that match, with nothing but their metadata."""


class Kube:
    """A typed-enough client: objects are JSON, verbs are few, every call has a time limit."""

    def __init__(self, api: ApiClient) -> None:
        """Use connect() to make one."""
        self._api = api

    @classmethod
    async def connect(cls) -> Self:
        """A client for the cluster this process runs in, or for KUBECONFIG."""
        configuration = Configuration()
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            incluster_config.load_incluster_config(client_configuration=configuration)
        else:
            await kube_config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = 32
        # A proxy stands in the configuration; to ask the environment again costs two threads for each request.
        configuration.client_session_kwargs = {"trust_env": False}
        api = ApiClient(configuration)
        api.user_agent = names.FIELD_MANAGER
        return cls(api)

    async def close(self) -> None:
        """Close every connection."""
        await self._api.close()

    # ------------------------------------------------------------ reading

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None when there is none."""
        try:
            return await self._request("GET", path(kind, namespace, name))
        except _Missing:
            return None

    async def list(self, kind: str, namespace: str | None, labels: str = "", fields: str = "") -> Objects:
        """All objects that match. Items carry no kind: the server leaves it out of lists."""
        return await self._pages(kind, namespace, {"labelSelector": labels, "fieldSelector": fields}, WHOLE)

    async def metadata(self, kind: str, namespace: str | None, labels: str = "") -> Objects:
        """All objects that match, with nothing but their metadata: a pod's is a tenth of the pod."""
        return await self._pages(kind, namespace, {"labelSelector": labels}, METADATA)

    async def _pages(self, kind: str, namespace: str | None, chosen: Mapping[str, str], accept: str) -> Objects:
        found: Objects = []
        token = ""
        while True:
            query = {**chosen, "limit": str(PAGE), "continue": token}
            given = {key: text for key, text in query.items() if text}
            page = await self._request("GET", path(kind, namespace), given, accept=accept)
            found += page.get("items") or []
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return found

    # ------------------------------------------------------------ writing

    async def create(self, made: Object) -> bool:
        """Make the object by POST; True when it is new, False when it stands already and is ours.

        Raises NameConflict when an object of its name belongs to someone else.
        """
        try:
            await self._request("POST", path_of(made, named=False), {"fieldManager": names.FIELD_MANAGER}, body=made)
        except _Exists:
            if await self._is_ours(made):
                return False
            raise NameConflict(made) from None
        return True

    async def apply(self, made: Object) -> None:
        """Make the object, or bring the fields that we own to what they shall be."""
        if await self.create(made):
            return
        await self._own(made)
        query = {"fieldManager": names.FIELD_MANAGER, "force": "true"}
        await self._request("PATCH", path_of(made), query, body=made, content="application/apply-patch+yaml")

    async def merge(self, ref: Ref, patch: Mapping[str, Any]) -> None:
        """Merge a patch into an object; nothing happens when it is gone."""
        query = {"fieldManager": names.FIELD_MANAGER}
        try:
            await self._request(
                "PATCH", path(ref.kind, ref.namespace, ref.name), query, body=dict(patch), content=MERGE
            )
        except _Missing:
            return

    async def write_status(self, resource: Object, status: Mapping[str, Any]) -> None:
        """Replace the status of one of our resources, if it is still the one that was read.

        Raises Stale when it has changed since.
        """
        body = {**resource, "status": dict(status)}
        try:
            await self._request("PUT", path_of(resource) + "/status", {"fieldManager": names.FIELD_MANAGER}, body=body)
        except _Missing as error:
            raise Stale(str(error)) from None

    async def delete(self, ref: Ref) -> None:
        """Delete an object, the one of this UID if it is given; nothing happens when it is gone."""
        options: Object = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Foreground" if ref.foreground else "Background",
        }
        if ref.uid is not None:
            options["preconditions"] = {"uid": ref.uid}
        if ref.grace_seconds is not None:
            options["gracePeriodSeconds"] = ref.grace_seconds
        try:
            await self._request("DELETE", path(ref.kind, ref.namespace, ref.name), body=options)
        except (_Missing, Stale):
            return

    async def release(self, pod: Object) -> None:
        """Take the evidence finalizer off a pod, leaving those of others."""
        finalizers = pod["metadata"].get("finalizers") or []
        if names.EVIDENCE_FINALIZER not in finalizers:
            return
        at = f"/metadata/finalizers/{finalizers.index(names.EVIDENCE_FINALIZER)}"
        patch = [
            {"op": "test", "path": at, "value": names.EVIDENCE_FINALIZER},
            {"op": "remove", "path": at},
        ]
        meta = pod["metadata"]
        try:
            await self._request(
                "PATCH",
                path("Pod", meta["namespace"], meta["name"]),
                {"fieldManager": names.FIELD_MANAGER},
                body=patch,
                content="application/json-patch+json",
            )
        except _Missing:
            return

    async def emit(self, about: Object, event: Event, now: str, name: str) -> None:
        """Write an event about a resource; the name makes the same event written twice one event."""
        meta = about["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": meta["namespace"]},
            "involvedObject": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
                "resourceVersion": meta.get("resourceVersion"),
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:1024],
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._request("POST", path("Event", meta["namespace"]), body=body)
        except _Exists:
            return

    # ------------------------------------------------------------ the wire

    async def _own(self, made: Object) -> None:
        """Make what we own by POST and merge patches owned by apply, or apply could never take any of it away."""
        present = await self.get(made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])
        meta = (present or {}).get("metadata", {})
        fields = owned_by_apply(meta.get("managedFields") or [])
        if fields is None:
            return
        patch = {"metadata": {"managedFields": fields, "resourceVersion": meta["resourceVersion"]}}
        query = {"fieldManager": names.FIELD_MANAGER}
        await self._request("PATCH", path_of(made), query, body=patch, content=MERGE)

    async def _is_ours(self, made: Object) -> bool:
        present = await self.get(made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])
        if present is None:
            raise Stale(f"{made['kind']} {made['metadata']['name']} went away while it was looked at")
        wanted = {owner["uid"] for owner in made["metadata"].get("ownerReferences", [])}
        owners = {owner["uid"] for owner in present["metadata"].get("ownerReferences", [])}
        if wanted & owners and not present["metadata"].get("deletionTimestamp"):
            return True
        if wanted & owners or _is_predecessors(present, made):
            raise Unavailable(f"{made['kind']} {made['metadata']['name']} of before is still going away")
        return False

    async def _request(
        self,
        method: str,
        url: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = WHOLE,
        accept: str = WHOLE,
    ) -> Object:
        headers: dict[str, str] = {"Accept": accept, "Content-Type": content}
        headers["User-Agent"] = names.FIELD_MANAGER
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], url, method, body)
        target = f"{self._api.configuration.host}{url}" + (f"?{urlencode(query)}" if query else "")
        what = f"{method} {url}"
        try:
            answer = await self._api.call_api(
                method, target, header_params=headers, body=body, _request_timeout=TIMEOUT_SECONDS
            )
            text = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"{what}: no answer from the API server: {error or type(error).__name__}") from error
        document = _json(text)
        if answer.status < 300:
            return document
        raise _error(answer.status, what, document)


def _is_predecessors(present: Object, made: Object) -> bool:
    """It was made for a resource of the same kind and name that was deleted: garbage collection is about to take it."""
    whose = (names.MANAGED_BY, names.OWNER_KIND, names.OWNER_NAME)
    theirs, ours = (each["metadata"].get("labels") or {} for each in (present, made))
    return all(key in ours and theirs.get(key) == ours[key] for key in whose)


def owned_by_apply(managed: list[Object]) -> list[Object] | None:
    """The managedFields with all entries of ours made one of server-side apply; None when they are so already."""
    ours = [entry for entry in managed if entry.get("manager") == names.FIELD_MANAGER and not entry.get("subresource")]
    if all(entry.get("operation") == "Apply" for entry in ours):
        return None
    fields: Object = {}
    for entry in ours:
        fields = _union(fields, entry.get("fieldsV1") or {})
    others = [entry for entry in managed if entry not in ours]
    return [*others, {**ours[0], "operation": "Apply", "fieldsV1": fields}]


def _union(one: Object, other: Object) -> Object:
    both = {key: _union(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


class _Missing(KubeError):
    """404; the public verbs turn it into None or nothing."""


class _Exists(KubeError):
    """409 AlreadyExists; create() asks whose it is."""


def _json(text: bytes) -> Object:
    try:
        document = json.loads(text or b"{}")
    except ValueError:
        return {"message": text[:500].decode(errors="replace")}
    return document if isinstance(document, dict) else {"message": str(document)}


def _error(code: int, what: str, status: Object) -> KubeError:
    message = f"{what}: {status.get('message') or code}"
    reason = status.get("reason")
    if code == 404:
        return _Missing(message)
    if code == 409 and reason == "AlreadyExists":
        return _Exists(message)
    if code == 409:
        return Stale(message)
    if code in (429, 408) or code >= 500:
        return Unavailable(message)
    return Refused(message)


def path(kind: str, namespace: str | None, name: str | None = None) -> str:
    """The URL path of an object or of a collection."""
    endpoint = ENDPOINTS[kind]
    within = f"/namespaces/{namespace}" if namespace else ""
    return f"{endpoint.prefix}{within}/{endpoint.plural}" + (f"/{name}" if name else "")


def path_of(made: Object, named: bool = True) -> str:
    """The URL path of an object as it is written."""
    meta = made["metadata"]
    return path(made["kind"], meta["namespace"], meta["name"] if named else None)
