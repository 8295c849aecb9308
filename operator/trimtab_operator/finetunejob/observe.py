"""One snapshot of a FineTuneJob and of all that belongs to it: the only room of this kind that reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from trimtab_api import inputs, names
from trimtab_api.contract import PROGRESS_KEY, ProgressReport
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_operator import lookup, trouble
from trimtab_operator.finetunejob import status
from trimtab_operator.finetunejob.seen import Seen, finished
from trimtab_operator.kube import Kube
from trimtab_operator.plan import Key, Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Reference, referenced

PATIENCE_SECONDS = 4
"""A pod that does not run after this long is asked for its events."""


async def observe(kube: Kube, key: Key, settings: Settings) -> tuple[Object, Seen] | None:
    """Read the job and what its state makes worth reading. None when it is gone; its pods are let go then."""
    raw = await kube.get(key.kind, key.namespace, key.name)
    selector = names.pods_of_name(key.kind, key.name)
    if raw is None:
        for pod in await kube.list("Pod", key.namespace, labels=selector):
            await kube.release(pod)
        return None
    job = FineTuneJob.read(raw)
    every = await kube.list("Pod", key.namespace, labels=selector)
    seen = Seen(job=job, settings=settings)
    open_attempt = seen.attempt.number if seen.attempt else None
    trainers = [pod for pod in every if _label(pod, names.ROLE) == "trainer"]
    mine = [pod for pod in trainers if _is_of(pod, job, open_attempt)]
    leavings = [pod for pod in trainers if not _is_of(pod, job, open_attempt)]
    if job.metadata.deletion_timestamp or finished(job):
        return raw, Seen(job=job, settings=settings, leavings=tuple(leavings + mine))
    checks = [pod for pod in every if _label(pod, names.ROLE) == "preflight" and _is_of(pod, job, None, "preflight")]
    number = open_attempt or 0
    progress = await kube.get("ConfigMap", key.namespace, names.progress(key.name)) if number else None
    return raw, Seen(
        job=job,
        settings=settings,
        producers={} if number else await lookup.producers(kube, key.namespace, references(job)),
        preflight=None if number else await kube.get("Job", key.namespace, names.preflight(key.name)),
        preflight_pods=tuple(checks),
        gang=await kube.get("PyTorchJob", key.namespace, names.pytorchjob(key.name, number)) if number else None,
        pods=tuple(mine),
        leavings=tuple(leavings),
        progress=progress,
        report=_report(progress, job, number),
        events=tuple(await _events(kube, key, mine if number else checks, seen)),
    )


def _label(pod: Object, name: str) -> str | None:
    value: str | None = (pod["metadata"].get("labels") or {}).get(name)
    return value


def _is_of(pod: Object, job: FineTuneJob, attempt: int | None, role: str = "trainer") -> bool:
    if _label(pod, names.OWNER_UID) != job.metadata.uid:
        return False
    return role == "preflight" or (attempt is not None and _label(pod, names.ATTEMPT) == str(attempt))


def references(job: FineTuneJob) -> list[Reference]:
    """The resources that the job waits for."""
    return [found for each in inputs.named(job.spec) if (found := referenced(each.source))]


def _report(config_map: Object | None, job: FineTuneJob, attempt: int) -> ProgressReport | None:
    """What the trainer of this attempt reports; a broken report is passed over, not believed."""
    owners = config_map["metadata"].get("ownerReferences") or [] if config_map else []
    if config_map is None or all(owner["uid"] != job.metadata.uid for owner in owners):
        return None
    return status.believed((config_map.get("data") or {}).get(PROGRESS_KEY), attempt)


async def _events(kube: Kube, key: Key, pods: Iterable[Mapping[str, Any]], seen: Seen) -> list[Object]:
    """The namespace's warnings, when a pod is late: nothing else tells why a volume is not mounted."""
    late = [pod for pod in pods if not trouble.ended(pod) and not trouble.running(pod) and _age(pod) > PATIENCE_SECONDS]
    waiting = seen.attempt is not None and not seen.attempt.reason and not list(pods)
    if not late and not waiting and (seen.attempt is not None or seen.job.status is None):
        return []
    return await kube.list("Event", key.namespace, fields="type=Warning")


def _age(pod: Mapping[str, Any]) -> float:
    created = pod["metadata"].get("creationTimestamp")
    return (datetime.now(UTC) - trouble.moment(created)).total_seconds() if created else 0.0
