"""Decides what a MergeJob needs next.

The batch Job makes one pod and no other; what its ending means is decided here and counted in status, so that mistakes
in the inputs cost nothing, a drained node costs no retry, and the count survives the operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from trimtab_api import names
from trimtab_api.conditions import INPUTS_SOUND, SUCCEEDED, SUSPENDED, Reason
from trimtab_api.contract import (
    PROGRESS_KEY,
    Connection,
    DataInput,
    JobIdentity,
    MergeAdapterInput,
    MergeConfig,
    OutputTarget,
    ProgressReport,
    S3Place,
    run_prefix,
)
from trimtab_api.v1alpha1 import MergeJob
from trimtab_api.v1alpha1.mergejob import MergeJobStatus, MergeProgress, ResolvedMerge
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_api.v1alpha1.status import MESSAGE_LIMIT, Artifact, PinnedInput
from trimtab_operator import trouble
from trimtab_operator.mergejob import build
from trimtab_operator.mergejob.build import CONFIG, CONTAINER, DISRUPTED, Work
from trimtab_operator.mergejob.status import attempt as attempt_of
from trimtab_operator.mergejob.status import condition, find, of, record, told
from trimtab_operator.plan import Event, Object, Plan, Ref
from trimtab_operator.snapshot import Snapshot
from trimtab_operator.sources import Unmet, base_of, connection, data_input, model_input, referenced
from trimtab_operator.trouble import PodEnd, Trouble

INPUT_MISTAKES = frozenset(
    {
        Reason.SPEC_INVALID, Reason.BUCKET_MISSING, Reason.OBJECT_MISSING, Reason.CREDENTIALS_MISSING,
        Reason.CREDENTIALS_WRONG, Reason.STORAGE_UNREACHABLE, Reason.MODEL_INVALID, Reason.BASE_MISMATCH,
        Reason.INPUT_CHANGED, Reason.DIGEST_MISMATCH, Reason.NOT_AN_ARTIFACT, Reason.UNSAFE_FORMAT,
        Reason.ADAPTER_UNSUPPORTED, Reason.DATA_INVALID, Reason.DATA_EMPTY, Reason.CHAT_TEMPLATE_MISSING,
    }
)  # fmt: skip
"""Endings that a user mends; the job waits and looks again, as a pod without accelerators costs little."""
PASSING = frozenset({Reason.CRASHED, Reason.OUT_OF_MEMORY, Reason.STORAGE_FAILED, Reason.STALLED})
"""Endings after which another attempt may go better."""

PREEMPTION_LIMIT = 100
RETRY_SECONDS = (10.0, 300.0)
"""Shortest and longest wait before another attempt; it doubles with each failure."""
RECHECK_SECONDS = (15.0, 300.0)
"""Shortest and longest wait before inputs are looked at again; as long as they have been wrong already."""
PENDING_SECONDS = 5.0
"""How often a pod that does not run is looked at: volumes that cannot be mounted are told by events alone."""
WAITING_SECONDS = 60.0


class Seen(Snapshot[MergeJob]):
    """The snapshot that observe takes."""

    @property
    def job(self) -> MergeJob:
        """The MergeJob."""
        return self.resource

    @property
    def work(self) -> Object | None:
        """The batch Job."""
        return self.child("Job", names.merge(self.job.metadata.name))

    @property
    def config_map(self) -> Object | None:
        """The ConfigMap with merge.json."""
        return self.child("ConfigMap", names.merge(self.job.metadata.name))


def plan(seen: Seen, now: datetime) -> Plan:
    """What to do now."""
    if seen.job.metadata.deletion_timestamp:
        return Plan()  # children go with their owner
    if finished(seen.job):
        return retain(seen, now)
    if (end := ending(seen)) is not None:
        return conclude(seen, now, end)
    if overdue(seen.job, now):
        return fail(seen, now, Reason.DEADLINE_EXCEEDED, "spec.activeDeadlineSeconds passed before the merge was done.")
    if seen.job.spec.suspend:
        return pause(seen, now)
    if seen.work is not None:
        return watch(seen, now, seen.work)
    return begin(seen, now)


def hindered(seen: Seen, now: datetime, reason: str, message: str) -> Mapping[str, Any]:
    """The status when an object cannot be made."""
    return told(seen.job, stamp(now), "Unknown", Reason(reason), message).dump()


# ---------------------------------------------------------------- to begin


def begin(seen: Seen, now: datetime) -> Plan:
    """Make the next Job when everything that it needs is there and the time has come."""
    work = resolve(seen)
    if isinstance(work, Unmet):
        return wait(seen, now, work)
    changed = seen.config_map is not None and _hash(seen.config_map) != work.hash
    wait_seconds = 0.0 if changed else remaining(seen.job, now)
    if wait_seconds > 0:
        return Plan(requeue_after=wait_seconds)
    if changed:
        # Made before the Job is, or its pod could still read the old one.
        fresh = condition(seen.job, INPUTS_SOUND, "Unknown", Reason.CHECKING, "the inputs are others now", stamp(now))
        status = told(seen.job, stamp(now), "Unknown", Reason.PENDING, "begins again with other inputs", beside=[fresh])
        return Plan(apply=(build.config_map(work),), status=status.dump(), patch=stale_report(seen), requeue_after=0)
    number = next_attempt(seen.job)
    reason, message = _unless_wrong(seen, Reason.PENDING, f"the pod of attempt {number} is being made")
    status = told(
        seen.job,
        stamp(now),
        "Unknown",
        reason,
        message,
        beside=_not_suspended(seen.job, now),
        attempt=number,
        attempts=record(of(seen.job).attempts, Attempt(number=number, start_time=stamp(now))),
        resolved=pinned(work),
    )
    return Plan(
        create=(*missing(seen, build.objects(work)), build.job(work, number)),
        status=status.dump(),
        patch=stale_report(seen),
        events=(Event("Normal", Reason.PENDING, f"attempt {number} begins"),),
    )


def stale_report(seen: Seen) -> tuple[tuple[Ref, Mapping[str, Any]], ...]:
    """Empty what an earlier pod reported: it tells nothing of the next one."""
    report = seen.child("ConfigMap", names.merge_report(seen.job.metadata.name))
    if report is None or not report.get("data"):
        return ()
    meta = report["metadata"]
    return ((Ref("ConfigMap", meta["namespace"], meta["name"], meta["uid"]), {"data": None}),)


def resolve(seen: Seen) -> Work | Unmet:
    """The configuration of the pod; once the work has started, the one that it started with."""
    job, settings = seen.job, seen.settings
    frozen = _frozen(seen) if of(job).start_time else None
    config = frozen or configure(seen)
    if isinstance(config, Unmet):
        return config
    kept = of(job).resolved
    image = kept.image if kept and kept.image and of(job).start_time else settings.images.trainer
    return Work(job, config, image, settings.image_pull_secrets)


def configure(seen: Seen) -> MergeConfig | Unmet:
    """merge.json as the spec and the referenced jobs have it now."""
    job, default = seen.job, seen.settings.storage
    spec = job.spec
    adapters = []
    for index, adapter in enumerate(spec.adapters):
        name = f"adapters[{index}].from"
        source = model_input(name, adapter.from_, ("adapter",), seen.producers, spec.storage, default, task="CAUSAL_LM")
        if isinstance(source, Unmet):
            return source
        adapters.append(MergeAdapterInput(source=source, weight=adapter.weight))
    trained = {
        f"adapters[{index}].from": seen.producers.get(reference)
        for index, adapter in enumerate(spec.adapters)
        if (reference := referenced(adapter.from_)) is not None
    }
    base = base_of(trained, seen.producers, default)
    if spec.base is not None and not isinstance(base, Unmet):
        base = model_input("base", spec.base, ("model",), seen.producers, spec.storage, default)
    if isinstance(base, Unmet):
        return base
    root = spec.output.uri or seen.settings.output
    if root is None:
        return Unmet(
            Reason.OUTPUT_MISSING,
            "neither spec.output.uri nor the installation says where results go. Set spec.output.uri to "
            "s3://BUCKET/PREFIX, or install the chart with storage.output.",
        )
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid)
    place = S3Place(uri=run_prefix(root, identity), connection=_output(seen))
    return MergeConfig(
        job=identity,
        # What may change while the work goes on is no part of what it is about.
        spec=spec.model_copy(update={"suspend": False, "ttl_seconds_after_finished": None}),
        base=base,
        adapters=adapters,
        calibration=_calibration(seen),
        output=OutputTarget(s3=place),
        progress_config_map=names.merge_report(job.metadata.name),
    )


def _calibration(seen: Seen) -> DataInput | None:
    wanted, spec = seen.job.spec.quantize, seen.job.spec
    if wanted is None or wanted.calibration is None:
        return None
    return data_input("quantize.calibration", wanted.calibration, spec.storage, seen.settings.storage)


def _output(seen: Seen) -> Connection:
    spec = seen.job.spec
    return connection(spec.output.storage, spec.storage, seen.settings.storage)


def _frozen(seen: Seen) -> MergeConfig | None:
    try:
        return MergeConfig.read(json.loads((seen.config_map or {})["data"][CONFIG.name]))
    except (KeyError, ValueError):
        return None


def pinned(work: Work) -> ResolvedMerge:
    """What was left to us, as it was decided."""
    inputs = [
        PinnedInput(
            field=each.field, uri=each.s3.uri if each.s3 else each.reference, digest=each.s3.digest if each.s3 else None
        )
        for each in build.inputs(work.config)
    ]
    output = work.config.output.s3.uri if work.config.output.s3 else None
    return ResolvedMerge(image=work.image, output_uri=output, inputs=inputs)


def next_attempt(job: MergeJob) -> int:
    """The number of the next Job: the same again when the last one found inputs wanting, or was never seen to end."""
    number = of(job).attempt
    last = attempt_of(job, number)
    if last is None or last.end_time is None:
        return max(number, 1)
    return number if last.reason in INPUT_MISTAKES else number + 1


def remaining(job: MergeJob, now: datetime) -> float:
    """Seconds until another pod may be made."""
    last = attempt_of(job, of(job).attempt)
    if last is None or last.end_time is None:
        return 0
    ended = trouble.moment(last.end_time)
    if last.reason in INPUT_MISTAKES:
        verdict = find(job, INPUTS_SOUND)
        since = trouble.moment(verdict.last_transition_time) if verdict is not None else ended
        pause_seconds = _within((ended - since).total_seconds(), *RECHECK_SECONDS)
    elif last.reason in PASSING:
        pause_seconds = _within(RETRY_SECONDS[0] * 2 ** max(of(job).failures - 1, 0), *RETRY_SECONDS)
    else:
        pause_seconds = 0
    return pause_seconds - (now - ended).total_seconds()


def wait(seen: Seen, now: datetime, unmet: Unmet) -> Plan:
    """Say what is missing; what it waits for wakes it."""
    status = told(seen.job, stamp(now), "Unknown", unmet.reason, unmet.message, beside=_not_suspended(seen.job, now))
    return Plan(status=status.dump(), events=_said(seen.job, status), requeue_after=WAITING_SECONDS)


# ---------------------------------------------------------------- while a Job stands


def watch(seen: Seen, now: datetime, work: Object) -> Plan:
    """Say how far it is, mend what was taken away, and start over when the inputs are others before it has started."""
    if work["metadata"].get("deletionTimestamp"):
        return Plan(requeue_after=PENDING_SECONDS)
    wanted = resolve(seen)
    if isinstance(wanted, Work) and not of(seen.job).start_time and superseded(seen, wanted, work):
        return Plan(delete=(_ref(work),), requeue_after=PENDING_SECONDS)
    number = attempt_number(work)
    began = work["metadata"]["creationTimestamp"]
    progress = reported(seen, began)
    begun = of(seen.job).start_time or (began if progress is not None and progress.total_shards else None)
    reason, message = _state(seen, work, progress)
    if progress is None and reason in (Reason.PENDING, Reason.RUNNING):
        reason, message = _unless_wrong(seen, reason, message)
    sound = condition(seen.job, INPUTS_SOUND, "True", Reason.INPUTS_SOUND, "the pod opened every input", stamp(now))
    status = told(
        seen.job,
        stamp(now),
        "Unknown",
        reason,
        message,
        beside=[*_not_suspended(seen.job, now), *([sound] if progress is not None else [])],
        attempt=number,
        attempts=record(of(seen.job).attempts, Attempt(number=number, start_time=began)),
        progress=progress or of(seen.job).progress,
        start_time=begun,
    )
    mended = missing(seen, build.objects(wanted)) if isinstance(wanted, Work) else ()
    return Plan(
        create=mended, status=status.dump(), events=_said(seen.job, status), requeue_after=_next_look(seen, now, status)
    )


def _unless_wrong(seen: Seen, reason: Reason, message: str) -> tuple[Reason, str]:
    """What was wrong with the inputs stays said until a pod has got past it."""
    verdict = find(seen.job, INPUTS_SOUND)
    if verdict is not None and verdict.status == "False":
        return Reason(verdict.reason), verdict.message
    return reason, message


def superseded(seen: Seen, wanted: Work, work: Object) -> bool:
    """The Job is about other inputs, or its image cannot be had and the installation names another one now."""
    if _hash(work) != wanted.hash:
        return True
    against = pod_trouble(seen)
    if against is None or against.reason is not Reason.IMAGE_UNAVAILABLE:
        return False
    image: str = work["spec"]["template"]["spec"]["containers"][0]["image"]
    return image != wanted.image


def _state(seen: Seen, work: Object, progress: MergeProgress | None) -> tuple[Reason, str]:
    name = work["metadata"]["name"]
    if not seen.pods:
        refused = trouble.refused(seen.warnings, name)
        return (refused.reason, refused.message) if refused else (Reason.PENDING, f"Job {name} makes its pod")
    if (against := pod_trouble(seen)) is not None:
        return against.reason, against.message
    if not trouble.running(seen.pods[-1]):
        return Reason.PENDING, f"pod {seen.pods[-1]['metadata']['name']} starts"
    if progress is not None:
        return Reason.RUNNING, f"{progress.shards} shards are written"
    return Reason.RUNNING, "the pod opens its inputs"


def pod_trouble(seen: Seen) -> Trouble | None:
    """What keeps the newest pod from running."""
    return trouble.of_pod(seen.pods[-1], seen.warnings) if seen.pods else None


def reported(seen: Seen, since: str) -> MergeProgress | None:
    """What the pod of this Job last wrote, if it fits the contract."""
    report = seen.child("ConfigMap", names.merge_report(seen.job.metadata.name)) or {}
    try:
        said = ProgressReport.read(json.loads((report.get("data") or {})[PROGRESS_KEY])).merge
        if said is None or (said.updated_time and trouble.moment(said.updated_time) < trouble.moment(since)):
            return None
    except (KeyError, ValueError, ValidationError):
        return None
    return said


def _next_look(seen: Seen, now: datetime, status: MergeJobStatus) -> float | None:
    if not (seen.pods and trouble.running(seen.pods[-1])):
        return PENDING_SECONDS
    limit = seen.job.spec.active_deadline_seconds
    if limit is None or status.start_time is None:
        return None
    return max(0.0, limit - (now - trouble.moment(status.start_time)).total_seconds())


def pause(seen: Seen, now: datetime) -> Plan:
    """Stop at the user's wish; the attempt costs nothing, and finished shards are kept."""
    last = attempt_of(seen.job, of(seen.job).attempt)
    attempts = of(seen.job).attempts
    if last is not None and last.end_time is None:
        closed = last.model_copy(update={"end_time": stamp(now), "reason": Reason.SUSPENDED})
        attempts = record(attempts, closed)
    words = "spec.suspend is true; no pod is held. Set it to false to go on."
    suspended = condition(seen.job, SUSPENDED, "True", Reason.SUSPENDED, words, stamp(now))
    status = told(seen.job, stamp(now), "Unknown", Reason.SUSPENDED, words, beside=[suspended], attempts=attempts)
    return Plan(status=status.dump(), delete=_living(seen), events=_said(seen.job, status))


# ---------------------------------------------------------------- when it has ended


def ending(seen: Seen) -> PodEnd | None:
    """How the pod of the standing Job ended. A pod that was deleted leaves its trace in the Job alone."""
    work = seen.work
    if work is None:
        return None
    number = str(attempt_number(work))
    pods = [pod for pod in seen.pods if pod["metadata"].get("labels", {}).get(names.ATTEMPT) == number]
    told_by_pod = trouble.end_of(pods[-1], CONTAINER) if pods else None
    if told_by_pod is not None:
        return told_by_pod
    over = next((each for each in (work.get("status") or {}).get("conditions") or [] if _is_over(each)), None)
    if over is None:
        return None
    words = (
        f"the pod was told to leave: {over.get('message', '')}"
        if over.get("reason") == DISRUPTED
        else "the pod was deleted before its ending could be read"
    )
    return PodEnd(
        pod=work["metadata"]["name"], reason=Reason.PREEMPTED, exit_code=None, message=words, hint="", ending=None
    )


def _is_over(condition: Mapping[str, Any]) -> bool:
    return condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True"


def conclude(seen: Seen, now: datetime, end: PodEnd) -> Plan:
    """Count the attempt once, and decide what follows."""
    assert seen.work is not None, "only a Job has an ending"
    number, began = attempt_number(seen.work), seen.work["metadata"]["creationTimestamp"]
    known = attempt_of(seen.job, number)
    if known is not None and known.end_time is not None and known.start_time == began:
        return Plan(delete=_living(seen), requeue_after=PENDING_SECONDS)  # it was counted; its Job has yet to go
    if end.succeeded:
        artifact = credible(seen, end)
        if artifact is not None:
            return finish(seen, now, end, artifact)
        words = "the pod said that it had succeeded and named no merged model below the output prefix"
        end = PodEnd(end.pod, Reason.CRASHED, end.exit_code, words, "", None)
    closed = _closed(seen, now, end)
    if end.reason in INPUT_MISTAKES:
        return recheck(seen, now, end, closed)
    if end.reason is Reason.PREEMPTED and of(seen.job).preemptions < PREEMPTION_LIMIT:
        return retry(seen, now, end, closed, preemptions=of(seen.job).preemptions + 1)
    if end.reason in PASSING and of(seen.job).failures < seen.job.spec.retries:
        return retry(seen, now, end, closed, failures=of(seen.job).failures + 1)
    return fail(seen, now, end.reason, _sentence(end), attempts=closed, last_failure=_sentence(end))


def _closed(seen: Seen, now: datetime, end: PodEnd) -> list[Attempt]:
    assert seen.work is not None, "only a Job has an ending"
    closed = Attempt(
        number=attempt_number(seen.work),
        start_time=seen.work["metadata"]["creationTimestamp"],
        end_time=stamp(now),
        reason=end.reason,
        exit_code=end.exit_code,
        message=end.message[:MESSAGE_LIMIT],
        hint=end.hint[:MESSAGE_LIMIT] or None,
    )
    return record(of(seen.job).attempts, closed)


def credible(seen: Seen, end: PodEnd) -> Artifact | None:
    """The artifact that a pod names, if it is a whole model below this job's own prefix."""
    artifact = end.ending.artifact if end.ending else None
    resolved = of(seen.job).resolved
    if artifact is None or artifact.kind != "model" or resolved is None or resolved.output_uri is None:
        return None
    return artifact if artifact.uri.startswith(f"{resolved.output_uri}/") else None


def finish(seen: Seen, now: datetime, end: PodEnd, artifact: Artifact) -> Plan:
    """The merged model is published."""
    found = {pin.field: pin for pin in (end.ending.pins if end.ending else [])}
    resolved = of(seen.job).resolved or ResolvedMerge()
    inputs = {pin.field: pin for pin in resolved.inputs} | found
    progress = reported(seen, _began(seen) or "") or of(seen.job).progress
    status = told(
        seen.job,
        stamp(now),
        "True",
        Reason.SUCCEEDED,
        f"the merged model is at {artifact.uri}",
        beside=[condition(seen.job, INPUTS_SOUND, "True", Reason.INPUTS_SOUND, "", stamp(now))],
        artifact=artifact,
        attempt=attempt_number(seen.work or {}),
        attempts=_closed(seen, now, end),
        start_time=of(seen.job).start_time or _began(seen),
        completion_time=stamp(now),
        progress=progress,
        resolved=resolved.model_copy(update={"inputs": list(inputs.values())[:16]}),
    )
    ttl = seen.job.spec.ttl_seconds_after_finished
    return Plan(status=status.dump(), events=_said(seen.job, status), requeue_after=None if ttl is None else float(ttl))


def recheck(seen: Seen, now: datetime, end: PodEnd, attempts: list[Attempt]) -> Plan:
    """Inputs are wrong: say so and look again, sooner at first; a change is noticed at once."""
    wrong = condition(seen.job, INPUTS_SOUND, "False", end.reason, _sentence(end), stamp(now))
    status = told(
        seen.job, stamp(now), "Unknown", end.reason, _sentence(end),
        beside=[wrong], attempts=attempts, attempt=attempt_number(seen.work or {}), last_failure=_sentence(end),
    )  # fmt: skip
    return Plan(
        status=status.dump(), delete=_living(seen), events=_said(seen.job, status), requeue_after=PENDING_SECONDS
    )


def retry(seen: Seen, now: datetime, end: PodEnd, attempts: list[Attempt], **counted: Any) -> Plan:
    """Another pod goes on from the finished shards."""
    status = told(
        seen.job,
        stamp(now),
        "Unknown",
        Reason.RESTARTING,
        f"attempt {attempts[-1].number} ended: {end.reason}: {_sentence(end)}",
        attempts=attempts,
        attempt=attempts[-1].number,
        last_failure=_sentence(end),
        start_time=of(seen.job).start_time or _began(seen),
        **counted,
    )
    return Plan(
        status=status.dump(), delete=_living(seen), events=_said(seen.job, status), requeue_after=PENDING_SECONDS
    )


def fail(seen: Seen, now: datetime, reason: Reason, message: str, **changes: Any) -> Plan:
    """The end, without a model. What was written stays in storage."""
    status = told(
        seen.job, stamp(now), "False", reason, message,
        start_time=of(seen.job).start_time or _began(seen), completion_time=stamp(now), **changes,
    )  # fmt: skip
    ttl = seen.job.spec.ttl_seconds_after_finished
    return Plan(
        status=status.dump(), delete=_unfinished(seen), events=_said(seen.job, status),
        requeue_after=None if ttl is None else float(ttl),
    )  # fmt: skip


def retain(seen: Seen, now: datetime) -> Plan:
    """Keep the ended job, with its last pod and log, for as long as it asks to be kept."""
    ttl, ended = seen.job.spec.ttl_seconds_after_finished, of(seen.job).completion_time
    left = None
    if ttl is not None and ended is not None:
        left = ttl - (now - trouble.moment(ended)).total_seconds()
        if left <= 0:
            meta = seen.job.metadata
            return Plan(delete=(Ref("MergeJob", meta.namespace, meta.name, meta.uid),))
    return Plan(delete=_unfinished(seen), requeue_after=left)


# ---------------------------------------------------------------- small words


def finished(job: MergeJob) -> bool:
    """It has succeeded or failed."""
    leading = find(job, SUCCEEDED)
    return leading is not None and leading.status != "Unknown"


def overdue(job: MergeJob, now: datetime) -> bool:
    """Its time is up."""
    limit, begun = job.spec.active_deadline_seconds, of(job).start_time
    return limit is not None and begun is not None and now - trouble.moment(begun) >= timedelta(seconds=limit)


def attempt_number(work: Object) -> int:
    """The attempt that a Job stands for."""
    return int(work.get("metadata", {}).get("labels", {}).get(names.ATTEMPT, "1"))


def missing(seen: Seen, objects: list[Object]) -> tuple[Object, ...]:
    """Those that do not stand, or are somebody else's."""
    return tuple(each for each in objects if seen.child(each["kind"], each["metadata"]["name"]) is None)


def stamp(now: datetime) -> str:
    """RFC 3339 in UTC, to the second, as the API server writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _hash(found: Object) -> str | None:
    annotations: Mapping[str, str] = found["metadata"].get("annotations") or {}
    return annotations.get(names.SPEC_HASH)


def _began(seen: Seen) -> str | None:
    return str(seen.work["metadata"]["creationTimestamp"]) if seen.work else None


def _ref(work: Object) -> Ref:
    """The Job, in the foreground: it stays until its pods are gone, so that no two of them ever write at once."""
    meta = work["metadata"]
    return Ref("Job", meta["namespace"], meta["name"], meta["uid"], foreground=True)


def _living(seen: Seen) -> tuple[Ref, ...]:
    """The Job, unless it goes already."""
    gone = seen.work is None or seen.work["metadata"].get("deletionTimestamp")
    return () if seen.work is None or gone else (_ref(seen.work),)


def _unfinished(seen: Seen) -> tuple[Ref, ...]:
    """The Job, unless it has ended: then it stays, for its log."""
    return () if ending(seen) is not None else _living(seen)


def _not_suspended(job: MergeJob, now: datetime) -> list[Any]:
    if find(job, SUSPENDED) is None:
        return []
    return [condition(job, SUSPENDED, "False", Reason.RUNNING, "", stamp(now))]


def _sentence(end: PodEnd) -> str:
    return f"{end.message} {end.hint}".strip()[:MESSAGE_LIMIT]


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _said(job: MergeJob, status: MergeJobStatus) -> tuple[Event, ...]:
    """An event for each new reason, so that `kubectl describe` tells the story."""
    before = find(job, SUCCEEDED)
    after = next(each for each in status.conditions if each.type == SUCCEEDED)
    if before is not None and before.reason == after.reason:
        return ()
    fine = after.reason in (
        Reason.WAITING, Reason.PENDING, Reason.RUNNING, Reason.SUSPENDED, Reason.SUCCEEDED,
    )  # fmt: skip
    return (Event("Normal" if fine else "Warning", after.reason, after.message),)
