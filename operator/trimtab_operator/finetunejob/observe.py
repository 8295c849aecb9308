"""One snapshot of a FineTuneJob and of all that belongs to it: the only room of this kind that reads."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from trimtab_api import inputs, names
from trimtab_api.contract import PROGRESS_KEY, ProgressReport
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_operator import lookup, trouble
from trimtab_operator.finetunejob import build, status
from trimtab_operator.finetunejob.seen import Seen, finished
from trimtab_operator.kube import Reader
from trimtab_operator.plan import Child, Gone, Key, Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Reference, referenced

PATIENCE_SECONDS = 4
"""A pod that does not run after this long is asked for its events."""
LISTENING_SECONDS = 60
"""A trainer that reported nothing for this long may have lost the right to: that is looked at then, and only then."""


async def observe(reader: Reader, key: Key, settings: Settings) -> tuple[Object, Seen] | Gone:
    """Read the job and what its state makes worth reading."""
    raw = await reader.get(key.kind, key.namespace, key.name)
    if raw is None:
        return await lookup.gone(reader, key)
    job = FineTuneJob.read(raw)
    seen = Seen(job=job, settings=settings)
    if job.metadata.deletion_timestamp or finished(job):
        return raw, Seen(job=job, settings=settings, leavings=await lookup.evidence(reader, key))
    if seen.attempt is None:
        return raw, await _between_attempts(reader, key, job, settings)
    return raw, await _within_attempt(reader, key, job, settings, seen.attempt)


async def _between_attempts(reader: Reader, key: Key, job: FineTuneJob, settings: Settings) -> Seen:
    """What the job waits for: other jobs, and the preflight."""
    preflight = await reader.get("Job", key.namespace, names.preflight(key.name))
    checks = await lookup.pods(reader, key.namespace, job.metadata.uid) if preflight is not None else ()
    checks = tuple(pod for pod in checks if _label(pod, names.ROLE) == "preflight")
    return Seen(
        job=job,
        settings=settings,
        producers=await lookup.producers(reader, key.namespace, references(job)),
        preflight=preflight,
        preflight_pods=checks,
        leavings=await lookup.evidence(reader, key),
        events=await _warnings(reader, key, preflight, checks, wanted=1),
    )


async def _within_attempt(reader: Reader, key: Key, job: FineTuneJob, settings: Settings, attempt: Attempt) -> Seen:
    """The gang and what it reports; what it is made from while any of that is missing."""
    number, unmade = attempt.number, attempt.uid is None
    every = await reader.list("Pod", key.namespace, names.pods_of_name(key.kind, key.name))
    mine = tuple(pod for pod in every if _is_of(pod, job, number))
    gang = _ours(job, await reader.get("PyTorchJob", key.namespace, names.pytorchjob(key.name, number)))
    maps = await reader.list("ConfigMap", key.namespace, names.children_of(job.metadata.uid))
    report = _report(maps, names.progress(key.name), number)
    missing = frozenset() if unmade else await _missing(reader, key, job, number, maps, report)
    return Seen(
        job=job,
        settings=settings,
        producers=await lookup.producers(reader, key.namespace, references(job)) if unmade or missing else {},
        gang=gang,
        pods=mine,
        leavings=tuple(pod for pod in every if lookup.is_evidence(pod) and pod not in mine),
        needless=await _needless(reader, key, job, number) if unmade else (),
        missing=missing,
        report=report,
        events=await _warnings(reader, key, gang, mine, job.spec.distributed.nodes),
    )


async def _missing(
    reader: Reader, key: Key, job: FineTuneJob, number: int, maps: Sequence[Object], report: ProgressReport | None
) -> frozenset[Child]:
    """The ConfigMaps of the attempt that do not stand, and the rights to report while no report comes."""
    wanted = {("ConfigMap", names.progress(key.name)), ("ConfigMap", names.run_config(key.name, number))}
    stands = {("ConfigMap", each["metadata"]["name"]) for each in maps}
    heard = report.progress.updated_time if report and report.progress else None
    if heard is None or _since(heard) > LISTENING_SECONDS:
        access = {(made["kind"], made["metadata"]["name"]) for made in build.access(job)}
        wanted |= access
        stands |= (await lookup.children(reader, key.namespace, access)).keys()
    return frozenset(wanted - stands)


async def _needless(reader: Reader, key: Key, job: FineTuneJob, number: int) -> tuple[Object, ...]:
    wanted = [("Job", names.preflight(key.name))]
    if number > 2:
        wanted += [("PyTorchJob", names.pytorchjob(key.name, number - 2))]
        wanted += [("ConfigMap", names.run_config(key.name, number - 2))]
    found = await lookup.children(reader, key.namespace, wanted)
    stands = [each for each in found.values() if not each["metadata"].get("deletionTimestamp")]
    return tuple(each for each in stands if _ours(job, each) is not None)


def references(job: FineTuneJob) -> list[Reference]:
    """The resources that the job waits for."""
    return [found for each in inputs.named(job.spec) if (found := referenced(each.source))]


def _label(pod: Object, name: str) -> str | None:
    value: str | None = (pod["metadata"].get("labels") or {}).get(name)
    return value


def _is_of(pod: Object, job: FineTuneJob, attempt: int) -> bool:
    wanted = {names.OWNER_UID: job.metadata.uid, names.ROLE: "trainer", names.ATTEMPT: str(attempt)}
    return all(_label(pod, name) == value for name, value in wanted.items())


def _ours(job: FineTuneJob, found: Object | None) -> Object | None:
    """The object, if it is this job's."""
    owners = found["metadata"].get("ownerReferences") or [] if found is not None else []
    return found if any(owner["uid"] == job.metadata.uid for owner in owners) else None


def _report(maps: Sequence[Object], name: str, attempt: int) -> ProgressReport | None:
    """What the trainer of this attempt reports; a broken report is passed over, not believed."""
    found = next((each for each in maps if each["metadata"]["name"] == name), {})
    return status.believed((found.get("data") or {}).get(PROGRESS_KEY), attempt)


async def _warnings(
    reader: Reader, key: Key, parent: Object | None, pods: Sequence[Object], wanted: int
) -> tuple[Object, ...]:
    """The warnings about pods that are late, and about their maker when some are missing: only they tell why."""
    late = [
        pod
        for pod in pods
        if not trouble.ended(pod)
        and not trouble.running(pod)
        and _since(pod["metadata"]["creationTimestamp"]) > PATIENCE_SECONDS
    ]
    about = [*late, *([parent] if parent is not None and len(pods) < wanted else [])]
    return await lookup.warnings(reader, key.namespace, (each["metadata"]["uid"] for each in about))


def _since(text: str) -> float:
    return (datetime.now(UTC) - trouble.moment(text)).total_seconds()
