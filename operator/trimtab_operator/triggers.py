"""Turns "something changed" into "look at this key again". Events carry no data beyond the key.

kopf watches; nothing else of it is used: no finalizer, no annotation, no handler that could lose a status.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import kopf

from trimtab_api import names
from trimtab_api.conditions import READY, SUCCEEDED
from trimtab_api.v1alpha1 import RESOURCES
from trimtab_operator.metrics import States
from trimtab_operator.plan import Key

CHILDREN: tuple[tuple[str, str, str], ...] = (
    ("", "v1", "pods"),
    ("", "v1", "configmaps"),
    ("batch", "v1", "jobs"),
    ("apps", "v1", "deployments"),
    ("kubeflow.org", "v1", "pytorchjobs"),
)
"""What we make and must see change, as group, version, plural."""

OUR_KINDS = {resource.kind for resource in RESOURCES}
REFERENCES = {"fineTuneJob": "FineTuneJob", "mergeJob": "MergeJob"}


class Dependents:
    """Who refers to whom, as far as it was seen: a hint that saves waiting for the next resync, never a fact."""

    def __init__(self) -> None:
        self._referrers: dict[Key, set[Key]] = {}
        self._references: dict[Key, set[Key]] = {}

    def seen(self, key: Key, spec: Any) -> None:
        """Remember what this resource refers to now; an empty spec forgets it."""
        wanted = {Key(kind, key.namespace, name) for kind, name in references(spec)}
        for gone in self._references.get(key, set()) - wanted:
            self._referrers[gone].discard(key)
        for new in wanted:
            self._referrers.setdefault(new, set()).add(key)
        self._references[key] = wanted

    def of(self, key: Key) -> set[Key]:
        """The resources that refer to this one."""
        return self._referrers.get(key, set())


def references(value: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of every reference to another resource of ours, wherever it stands in a spec."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name in REFERENCES and isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
                yield REFERENCES[name], inner["name"]
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def owner(body: Mapping[str, Any]) -> Key | None:
    """The resource that a child belongs to, by its labels."""
    meta = body.get("metadata", {})
    labels = meta.get("labels") or {}
    kind, name = labels.get(names.OWNER_KIND), labels.get(names.OWNER_NAME)
    if kind not in OUR_KINDS or not name:
        return None
    return Key(kind, meta["namespace"], name)


def state(body: Mapping[str, Any]) -> str:
    """The reason of the leading condition."""
    for condition in (body.get("status") or {}).get("conditions") or []:
        if condition.get("type") in (SUCCEEDED, READY):
            return str(condition.get("reason"))
    return "New"


def registry(ask: Callable[[Key], None], relisted: Callable[[], None], states: States) -> kopf.OperatorRegistry:
    """The watches: each change asks for a look at a key.

    An event without a type is no change: the watch has begun, or begun again, with a list of what there is. What
    happened before it nobody told, not even which key it was, so that calls `relisted`.
    """
    made = kopf.OperatorRegistry()
    dependents = Dependents()

    async def resource_changed(type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        meta = body["metadata"]
        key = Key(body["kind"], meta["namespace"], meta["name"])
        gone = type == "DELETED"
        dependents.seen(key, None if gone else body.get("spec"))
        states.seen(key.kind, key.namespace, key.name, None if gone else state(body))
        if type is None:
            relisted()
            return
        ask(key)
        for dependent in dependents.of(key):
            ask(dependent)

    async def child_changed(type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        key = owner(body)
        if type is None:
            relisted()
        elif key is not None:
            ask(key)

    for resource in RESOURCES:
        kopf.on.event(names.GROUP, names.VERSION, resource.plural, registry=made)(resource_changed)
    for group, version, plural in CHILDREN:
        kopf.on.event(group, version, plural, registry=made)(child_changed)
    kopf.on.login(registry=made)(_login)
    kopf.on.startup(registry=made)(_configure)
    return made


async def _login(**arguments: Any) -> Any:
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)


class NoDiffBase(kopf.DiffBaseStorage):
    """Remembers nothing of an object: kopf would copy each one twice, for kinds of handlers that we have none of."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Nothing of the object matters."""
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        """Nothing was kept."""

    def store(self, **_: Any) -> None:
        """Nothing is kept."""


async def _configure(settings: kopf.OperatorSettings, **arguments: Any) -> None:
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.scanning.disabled = True
    for *_, plural in CHILDREN:
        settings.watching.label_selectors[plural] = names.CHILDREN
    settings.networking.request_timeout = 30
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
