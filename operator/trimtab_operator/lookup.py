"""Reads that the observe rooms of several kinds have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from trimtab_api import names
from trimtab_api.v1alpha1 import FineTuneJob, MergeJob
from trimtab_operator.kube import Reader
from trimtab_operator.plan import Child, Gone, Key, Object
from trimtab_operator.sources import Producer, Producers, Reference


async def producers(reader: Reader, namespace: str, references: Iterable[Reference]) -> Producers:
    """The resources that are referred to; None for each that does not exist."""
    wanted = sorted(set(references))
    found = await asyncio.gather(*(reader.get(each.kind, namespace, each.name) for each in wanted))
    return {reference: _producer(document) for reference, document in zip(wanted, found, strict=True)}


def _producer(document: Object | None) -> Producer | None:
    if document is None:
        return None
    return FineTuneJob.read(document) if document["kind"] == "FineTuneJob" else MergeJob.read(document)


async def children(reader: Reader, namespace: str, wanted: Iterable[Child]) -> Mapping[Child, Object]:
    """The objects of these kinds and names that exist, whoever made them."""
    each = list(wanted)
    found = await asyncio.gather(*(reader.get(kind, namespace, name) for kind, name in each))
    return {child: document for child, document in zip(each, found, strict=True) if document is not None}


async def pods(reader: Reader, namespace: str, uid: str) -> tuple[Object, ...]:
    """The pods of one of our resources, oldest first."""
    found = await reader.list("Pod", namespace, names.children_of(uid))
    return tuple(sorted(found, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"])))


async def warnings(reader: Reader, namespace: str, about: Iterable[str]) -> tuple[Object, ...]:
    """The Warning events about objects of these UIDs."""
    lists = await asyncio.gather(
        *(
            reader.list("Event", namespace, fields=f"involvedObject.uid={uid},type=Warning")
            for uid in sorted(set(about))
        )
    )
    return tuple(event for found in lists for event in found)


async def evidence(reader: Reader, key: Key) -> tuple[Object, ...]:
    """The metadata of the pods of this resource, or of a predecessor of its name, that the evidence finalizer keeps."""
    found = await reader.metadata("Pod", key.namespace, names.pods_of_name(key.kind, key.name))
    return tuple(pod for pod in found if is_evidence(pod))


def is_evidence(pod: Object) -> bool:
    """The evidence finalizer keeps this pod."""
    return names.EVIDENCE_FINALIZER in (pod["metadata"].get("finalizers") or [])


async def gone(reader: Reader, key: Key) -> Gone:
    """What a resource that was deleted left behind."""
    return Gone(await evidence(reader, key))
