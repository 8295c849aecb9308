"""One snapshot of a MergeJob: itself, what it refers to, what was made for it, and how its pod does."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab_api import names
from trimtab_api.v1alpha1 import FineTuneJob, MergeJob
from trimtab_operator import lookup, trouble
from trimtab_operator.kube import Reader
from trimtab_operator.mergejob.plan import Seen, finished
from trimtab_operator.plan import Child, Gone, Key, Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producers, Reference, referenced


async def observe(settings: Settings, reader: Reader, key: Key) -> tuple[Object, Seen] | Gone:
    """The snapshot, or that the resource is gone."""
    document = await reader.get(key.kind, key.namespace, key.name)
    if document is None:
        return Gone()
    job = MergeJob.read(document)
    # The Job is read before its pods: a Job that has ended has pods that have ended.
    children = await lookup.children(reader, key.namespace, _children(job))
    work = children.get(("Job", names.merge(key.name)))
    pods = await lookup.pods(reader, key.namespace, job.metadata.uid) if work else ()
    living = [pod for pod in pods if not trouble.ended(pod) and not trouble.running(pod)]
    about = [work, *living] if work and (living or not pods) and not finished(job) else []
    return document, Seen(
        resource=job,
        settings=settings,
        producers={} if finished(job) else await _producers(reader, job),
        children=children,
        pods=pods,
        warnings=await lookup.warnings(reader, key.namespace, (each["metadata"]["uid"] for each in about)),
    )


def _children(job: MergeJob) -> list[Child]:
    name = names.merge(job.metadata.name)
    if finished(job):
        return [("Job", name)]
    report = ("ConfigMap", names.merge_report(job.metadata.name))
    return [report, *((kind, name) for kind in ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"))]


async def _producers(reader: Reader, job: MergeJob) -> Producers:
    """What the job refers to, and what those adapters were trained from: it tells how their base is reached."""
    sources = [*(adapter.from_ for adapter in job.spec.adapters), *([job.spec.base] if job.spec.base else [])]
    first = await lookup.producers(reader, job.metadata.namespace, _references(referenced(each) for each in sources))
    if job.spec.base is not None:
        return first
    trained = [each for each in first.values() if isinstance(each, FineTuneJob) and each.spec.model.from_]
    further = _references(referenced(each.spec.model.from_) for each in trained if each.spec.model.from_)
    return {**await lookup.producers(reader, job.metadata.namespace, further), **first}


def _references(found: Iterable[Reference | None]) -> list[Reference]:
    return [each for each in found if each is not None]
