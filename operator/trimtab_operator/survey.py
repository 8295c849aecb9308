"""One moment of the whole cluster, taken by a few lists: it tells which resources rest, so that a thousand idle ones
cost no request each when the operator starts, when a watch begins anew, and at every resync.

It holds our resources whole and of the commonest children only that they exist. What it does not hold, it refuses to
tell of: the resource is then looked at by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Self

from trimtab_api import names
from trimtab_api.v1alpha1 import RESOURCES
from trimtab_operator.kube import Objects, Reader
from trimtab_operator.plan import Key, Object

CHILDREN = ("Pod", "Job")
"""Kinds whose existence is known. They are listed after our own, so that a child never lacks its owner."""

_OURS = frozenset(resource.kind for resource in RESOURCES)


class NotHeld(Exception):
    """The survey cannot tell: it holds less than was asked for."""


class Survey:
    """A Reader of what was there at one moment."""

    def __init__(self) -> None:
        """Use take() to fill one."""
        self._ours: dict[Key, Object] = {}
        self._children: dict[Key, Object] = {}
        self._labelled: dict[tuple[str, str, str, str], list[Object]] = defaultdict(list)

    @classmethod
    async def take(cls, reader: Reader, namespaces: Sequence[str]) -> Self:
        """List what there is in these namespaces; in all when none is named. Raises KubeError."""
        survey = cls()
        everywhere: list[str | None] = [*namespaces] or [None]
        for resource in RESOURCES:
            for namespace in everywhere:
                for item in await reader.list(resource.kind, namespace):
                    survey._hold(resource.kind, item)
        for kind in CHILDREN:
            for namespace in everywhere:
                for item in await reader.metadata(kind, namespace, names.CHILDREN):
                    survey._note(kind, item)
        return survey

    def resources(self) -> set[Key]:
        """Every resource that there is, and those that are gone and left evidence."""
        return {*self._ours, *(owner for pod in self._children.values() if (owner := _kept_for(pod)) is not None)}

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The resource; None when there is none. Raises NotHeld for any other object that exists."""
        key = Key(kind, namespace, name)
        if kind in _OURS:
            return self._ours.get(key)
        if kind in CHILDREN and key not in self._children:
            return None
        raise NotHeld(str(key))

    async def list(self, kind: str, namespace: str | None, labels: str = "", fields: str = "") -> Objects:
        """Nothing, when nothing matches. Raises NotHeld otherwise."""
        if fields or await self.metadata(kind, namespace, labels):
            raise NotHeld(kind)
        return []

    async def metadata(self, kind: str, namespace: str | None, labels: str = "") -> Objects:
        """The metadata of all children that match labels of the form `a=b,c=d`. Raises NotHeld for other kinds."""
        if kind not in CHILDREN or namespace is None or not labels:
            raise NotHeld(kind)
        terms = [term.partition("=") for term in labels.split(",")]
        lists = [self._labelled.get((kind, namespace, label, value), []) for label, _, value in terms]
        return [item for item in min(lists, key=len) if all(_has(item, label, value) for label, _, value in terms)]

    def _hold(self, kind: str, item: Object) -> None:
        # A list leaves out what all its items have in common.
        self._ours[_key(kind, item)] = {"apiVersion": names.API_VERSION, "kind": kind, **item}

    def _note(self, kind: str, item: Object) -> None:
        self._children[_key(kind, item)] = item
        meta = item["metadata"]
        for label, value in (meta.get("labels") or {}).items():
            self._labelled[kind, meta["namespace"], label, value].append(item)


def _key(kind: str, item: Object) -> Key:
    meta = item["metadata"]
    meta.pop("managedFields", None)  # half of an object, and nobody decides by it
    return Key(kind, meta["namespace"], meta["name"])


def _has(item: Object, label: str, value: str) -> bool:
    return bool((item["metadata"].get("labels") or {}).get(label) == value)


def _kept_for(pod: Object) -> Key | None:
    """Whose evidence a pod is."""
    meta = pod["metadata"]
    labels = meta.get("labels") or {}
    if names.EVIDENCE_FINALIZER not in (meta.get("finalizers") or []):
        return None
    kind, name = labels.get(names.OWNER_KIND), labels.get(names.OWNER_NAME)
    return Key(kind, meta["namespace"], name) if kind in _OURS and name else None
