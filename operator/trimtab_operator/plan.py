"""The Plan: what a look at one resource decided should happen. It is data; reconcile carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
"""A Kubernetes object as JSON types."""
Child = tuple[str, str]
"""Kind and name of an object in the namespace of its owner."""


@dataclass(frozen=True, order=True)
class Key:
    """One resource of ours."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, order=True)
class Ref:
    """An object to delete, told apart from a later namesake by its UID."""

    kind: str
    namespace: str
    name: str
    uid: str | None = None
    grace_seconds: int | None = None
    foreground: bool = False
    """True keeps the object until what it owns is gone."""


@dataclass(frozen=True)
class Event:
    """A line for `kubectl describe`."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """The effects of one reconcile, in the order in which they happen."""

    apply: tuple[Object, ...] = ()
    """Objects that shall look like this: made by POST, then kept so by server-side apply."""
    create: tuple[Object, ...] = ()
    """Objects that shall exist; made by POST, and left as they are when they exist and are ours."""
    status: Mapping[str, Any] | None = None
    """The whole status to write; None leaves it."""
    release: tuple[Object, ...] = ()
    """Pods whose ending is in that status: their evidence finalizer may go."""
    patch: tuple[tuple[Ref, Mapping[str, Any]], ...] = ()
    """Merge patches on objects whose contents others own as well."""
    delete: tuple[Ref, ...] = ()
    """Objects that shall go, after the status that tells of them is written."""
    events: tuple[Event, ...] = ()
    """Said only when the status was written."""
    requeue_after: float | None = None
    """Look again after this many seconds, whatever happens; None waits for an event."""

    def changes(self, resource: Object) -> bool:
        """Whether carrying it out would change anything, the resource being as it was seen."""
        told = self.status is not None and dict(self.status) != (resource.get("status") or {})
        return told or any((self.create, self.apply, self.release, self.patch, self.delete))


@dataclass(frozen=True)
class Gone:
    """There is no such resource any more."""

    leavings: tuple[Object, ...] = ()
    """Its pods that the evidence finalizer still keeps."""
