"""What should happen to a FineTuneJob now. Pure: plan(seen, now) reads no clock, no client and no event.

An attempt is open (no end, no reason), ending (a reason, no end: its gang is on its way out) or closed (an end). It
stands in status before anything of it is made, which fixes the spec that it is made from; the UID of its PyTorchJob
says that it was made. Everything that must survive the operator between two looks stands in status.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from trimtab_api import names
from trimtab_api.conditions import INPUTS_SOUND, SUSPENDED, Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.progress import Attempt, FineTuneJobStatus
from trimtab_api.v1alpha1.status import Condition
from trimtab_operator import trouble
from trimtab_operator.finetunejob import build, gang, outofmemory, status
from trimtab_operator.finetunejob.seen import Seen, finished
from trimtab_operator.finetunejob.status import Word
from trimtab_operator.plan import Event, Object, Plan, Ref
from trimtab_operator.sources import Unmet
from trimtab_operator.trouble import PodEnd, Trouble

CHECK_SECONDS = 3.0
"""Pace of looking while pods start: their warnings wake nobody."""
WATCH_SECONDS = 30.0
"""Pace of looking while pods run: for deadlines and hangs."""
CLOSING_SECONDS = 2.0
"""Pace of looking while a gang goes away."""
CLEANING_SECONDS = 30.0
"""After a failure training-operator sends the rest of the gang away; after this long it is done for it."""
RECHECK_SECONDS = (5.0, 300.0)
"""Shortest and longest wait before inputs are looked at again: half as long as they have been wrong."""

REFUSED_SECONDS = 15.0
"""Wait before an attempt that could not be made is begun again; a changed spec ends it."""

STUCK_SECONDS = 10.0
"""What a pod is given to find the Secret, claim or image that it lacks, beyond the time between two looks."""

MENDED_BY_USER = frozenset({Reason.CREDENTIALS_MISSING, Reason.VOLUME_UNAVAILABLE, Reason.IMAGE_UNAVAILABLE})
"""What keeps a preflight's pod from starting until somebody makes what it mounts or pulls."""

NOT_BILLED = frozenset(
    {
        Reason.SUSPENDED, Reason.UNSCHEDULABLE, Reason.PODS_REFUSED, Reason.IMAGE_UNAVAILABLE,
        Reason.VOLUME_UNAVAILABLE,
    }
)  # fmt: skip
"""Endings that are nobody's failure: the gang never ran, or the user stopped it."""

INPUTS = frozenset(
    {
        Reason.BUCKET_MISSING, Reason.OBJECT_MISSING, Reason.CREDENTIALS_MISSING, Reason.CREDENTIALS_WRONG,
        Reason.STORAGE_UNREACHABLE, Reason.DATA_INVALID, Reason.DATA_EMPTY, Reason.MODEL_INVALID,
        Reason.CHAT_TEMPLATE_MISSING, Reason.BASE_MISMATCH, Reason.INPUT_CHANGED, Reason.DIGEST_MISMATCH,
        Reason.NOT_AN_ARTIFACT,
    }
)  # fmt: skip
"""Endings that a mended input cures: the inputs are looked at again before the next attempt."""

FINAL = frozenset({Reason.SPEC_INVALID, Reason.ASSERTION_FAILED, Reason.DEADLINE_EXCEEDED})
"""Endings that another attempt would only repeat."""


def plan(seen: Seen, now: datetime) -> Plan:
    """The next step, read from top to bottom as a checklist."""
    if seen.job.metadata.deletion_timestamp:
        return Plan(release=seen.leavings)
    if finished(seen.job):
        return retain(seen, now)
    if seen.attempt is not None and seen.attempt.reason:
        return closing(seen, now)
    if seen.attempt is not None:
        return watch(seen, now) if seen.attempt.uid else make(seen, now, seen.attempt)
    if (left := deadline(seen, now)) is not None and left <= 0 and not seen.job.spec.suspend:
        return expire(seen, now)
    if seen.job.spec.suspend:
        return pause(seen, now)
    if (wait := pace(seen, now)) > 0:
        return Plan(release=seen.leavings, requeue_after=wait)
    return begin(seen, now)


def hindered(seen: Seen, now: datetime, reason: str, message: str) -> dict[str, Any]:
    """The status when an object cannot be made. An attempt of which nothing runs is taken back, so that spec can be
    mended: with the first one goes the start that fixes it."""
    word = Word(Reason(reason), message)
    attempt = seen.attempt
    if attempt is None or attempt.uid is not None or seen.gang is not None:
        return status.told(seen.job, now, "Unknown", word).dump()
    ended = attempt.model_copy(
        update={"end_time": status.stamp(now), "reason": word.reason.value, "message": status.cut(message)}
    )
    first = {"start_time": None, "resolved": None} if attempt.number == 1 else {}
    return status.told(
        seen.job,
        now,
        "Unknown",
        word,
        attempt=attempt.number - 1,
        attempts=status.record(seen.job, ended),
        **first,
    ).dump()


# ------------------------------------------------------------ before an attempt


def expire(seen: Seen, now: datetime) -> Plan:
    """The deadline passed between two attempts."""
    word = Word(Reason.DEADLINE_EXCEEDED, f"{_too_late(seen)}. No further attempt is made.")
    told = status.told(seen.job, now, "False", word, completion_time=status.stamp(now))
    event = Event("Warning", word.reason, word.message)
    return Plan(status=told.dump(), release=seen.leavings, delete=_preflight_ref(seen), events=(event,))


def pause(seen: Seen, now: datetime) -> Plan:
    """No attempt runs and none shall start."""
    word = Word(Reason.SUSPENDED, "spec.suspend is true; no pod is held. Set it to false to go on.")
    return Plan(
        status=status.told(seen.job, now, "Unknown", word).dump(), release=seen.leavings, delete=_preflight_ref(seen)
    )


def pace(seen: Seen, now: datetime) -> float:
    """Seconds until the next attempt may start: none after a pause or preemption, longer with each failure."""
    last, known = seen.last, status.of(seen.job)
    if last is None or last.end_time is None or last.reason in (Reason.SUSPENDED, Reason.PREEMPTED):
        return 0.0
    row = known.failures
    if last.reason in NOT_BILLED:
        row = sum(each.reason in NOT_BILLED for each in known.attempts) + 2
    wait = min(600.0, 5.0 * 2.0 ** min(row, 10))
    if last.number > known.attempt:  # it was taken back
        wait = REFUSED_SECONDS if known.observed_generation == seen.job.metadata.generation else 0.0
    return (trouble.moment(last.end_time) + timedelta(seconds=wait) - now).total_seconds()


def begin(seen: Seen, now: datetime) -> Plan:
    """Resolve, check the inputs, then start the next attempt."""
    known = status.of(seen.job)
    config = configure(seen, known.attempt + 1)
    if isinstance(config, Unmet):
        # Told apart from a preflight's finding, which has looked at the inputs: nothing was looked at here.
        told = status.told(seen.job, now, "Unknown", Word(config.reason, config.message))
        return Plan(status=told.dump(), release=seen.leavings, delete=_preflight_ref(seen))
    if known.start_time is not None and seen.last is not None and seen.last.reason not in INPUTS:
        return start(seen, now, config)
    return check(seen, now, config)


def configure(seen: Seen, number: int) -> RunConfig | Unmet:
    """What the pods of this attempt are told. Inputs and image are those that the first attempt pinned."""
    known = status.of(seen.job)
    pinned = known.resolved
    image = (pinned.image if pinned else None) or seen.settings.images.trainer
    pins = pinned.inputs if pinned and known.start_time else ()
    return build.run_config(seen.job, seen.settings, seen.producers, number, image, pins)


def check(seen: Seen, now: datetime, config: RunConfig) -> Plan:
    """Have the inputs looked at by a small pod, before any accelerator is asked for."""
    job = seen.job
    hashed = build.inputs_hash(config, status.of(job).failures)
    checking = status.told(job, now, "Unknown", _checking(seen)).dump()
    if seen.preflight is None:
        made = build.preflight(job, config.model_copy(update={"attempt": 0}), seen.settings, hashed)
        return Plan(
            create=(made[1],), apply=(made[0],), status=checking, release=seen.leavings, requeue_after=CHECK_SECONDS
        )
    if (seen.preflight["metadata"].get("annotations") or {}).get(names.SPEC_HASH) != hashed:
        return Plan(status=checking, delete=_preflight_ref(seen), requeue_after=1.0)
    if seen.preflight["metadata"].get("deletionTimestamp"):
        return Plan(requeue_after=1.0)
    end = _preflight_end(seen)
    if end is None:
        return _still_checking(seen, now)
    if end.exit_code == 0 and end.ending is not None:
        return start(seen, now, config, end)
    return _mistake(seen, now, end)


def _checking(seen: Seen) -> Word:
    """While it is looked at again, what was found last stays in sight."""
    found = status.find(seen.job, INPUTS_SOUND)
    if found is not None and found.status == "False" and found.observed_generation == seen.job.metadata.generation:
        return Word(Reason(found.reason), found.message)
    return Word(Reason.CHECKING, "a small pod looks at sources, rows, model and tokenizer")


def _preflight_end(seen: Seen) -> PodEnd | None:
    ends = [end for pod in seen.preflight_pods if (end := trouble.end_of(pod, build.PREFLIGHT_CONTAINER))]
    if ends:
        return ends[-1]
    failed = any(
        each.get("type") == "Failed" and each.get("status") == "True"
        for each in ((seen.preflight or {}).get("status") or {}).get("conditions") or []
    )
    if failed and not seen.preflight_pods:
        return PodEnd("", Reason.CRASHED, None, "the pod that looks at the inputs went away", "", None)
    return None


def _still_checking(seen: Seen, now: datetime) -> Plan:
    """The pod lives, or is not there yet: say what keeps it."""
    found = next((found for pod in seen.preflight_pods if (found := trouble.of_pod(pod, seen.events))), None)
    if found is None and not seen.preflight_pods:
        found = trouble.refused(seen.events, names.preflight(seen.job.metadata.name))
    if found is None or seen.preflight is None or found.reason not in MENDED_BY_USER:
        word = Word(found.reason, _remedied(found)) if found else _checking(seen)
        told = status.told(seen.job, now, "Unknown", word)
        return Plan(status=told.dump(), release=seen.leavings, requeue_after=CHECK_SECONDS)
    # The kubelet tries mounts and pulls ever more rarely; a new pod is tried at once.
    word = Word(found.reason, _remedied(found))
    conditions = status.with_inputs(seen.job, "False", word, now)
    stood = (now - trouble.moment(seen.preflight["metadata"]["creationTimestamp"])).total_seconds()
    stuck = stood > STUCK_SECONDS + _recheck_after(conditions, now)
    return Plan(
        status=status.told(seen.job, now, "Unknown", word, conditions=conditions).dump(),
        release=seen.leavings,
        delete=_preflight_ref(seen) if stuck else (),
        requeue_after=CHECK_SECONDS,
    )


def _recheck_after(conditions: list[Condition], now: datetime) -> float:
    """Seconds from one look at the inputs to the next."""
    since = next(each.last_transition_time for each in conditions if each.type == INPUTS_SOUND)
    shortest, longest = RECHECK_SECONDS
    return min(longest, max(shortest, (now - trouble.moment(since)).total_seconds() / 2))


def _mistake(seen: Seen, now: datetime, end: PodEnd) -> Plan:
    """The inputs are not sound. Nothing is held; they are looked at again, less often the longer it lasts."""
    reason = end.reason
    word = Word(reason, status.sentence(end.message, end.hint, reason))
    conditions = status.with_inputs(seen.job, "False", word, now)
    again = _recheck_after(conditions, now)
    looked = _ended_at(seen)
    wait = again - (now - looked).total_seconds() if looked else again
    told = status.told(seen.job, now, "Unknown", word, conditions=conditions)
    event = Event("Warning", reason, word.message)
    if wait > 0:
        return Plan(status=told.dump(), release=seen.leavings, events=(event,), requeue_after=wait)
    return Plan(status=told.dump(), release=seen.leavings, delete=_preflight_ref(seen), requeue_after=1.0)


def _ended_at(seen: Seen) -> datetime | None:
    for pod in reversed(seen.preflight_pods):
        for container in pod.get("status", {}).get("containerStatuses") or []:
            if finished_at := container.get("state", {}).get("terminated", {}).get("finishedAt"):
                return trouble.moment(finished_at)
    return None


def _preflight_ref(seen: Seen) -> tuple[Ref, ...]:
    if seen.preflight is None:
        return ()
    meta = seen.preflight["metadata"]
    return (Ref("Job", meta["namespace"], meta["name"], uid=meta["uid"], foreground=True),)


def start(seen: Seen, now: datetime, config: RunConfig, verdict: PodEnd | None = None) -> Plan:
    """Write the next attempt down, with what it is made from. It is made at the next look, which comes at once."""
    job, known = seen.job, status.of(seen.job)
    ending = verdict.ending if verdict else None
    pins = list(ending.pins) if ending and known.start_time is None else list(config.pins)
    conditions = known.conditions
    if ending is not None:
        found = ending.message or "every input is sound"
        conditions = status.with_inputs(job, "True", Word(Reason.INPUTS_SOUND, found), now)
    attempt = Attempt(
        number=config.attempt,
        start_time=status.stamp(now),
        per_device_batch_size=config.resolved.per_device_batch_size,
    )
    told = status.told(
        job,
        now,
        "Unknown",
        _being_made(config.attempt),
        conditions=conditions,
        start_time=known.start_time or status.stamp(now),
        attempt=config.attempt,
        attempts=status.record(job, attempt),
        resolved=config.resolved.model_copy(update={"inputs": pins}),
        memory=(ending.memory if ending else None) or known.memory,
        suspended_seconds=known.suspended_seconds + _was_suspended(seen, now),
    )
    return Plan(status=told.dump(), release=seen.leavings, requeue_after=0.0)


def _being_made(number: int) -> Word:
    return Word(Reason.PENDING, f"attempt {number}: the pods are being made")


def make(seen: Seen, now: datetime, attempt: Attempt) -> Plan:
    """Make what the attempt in status asks for; once its PyTorchJob is seen, clear away what is over and say so."""
    job = seen.job
    if seen.gang is not None and seen.needless:
        return Plan(delete=tuple(_ref(each) for each in seen.needless), requeue_after=0.0)
    if seen.gang is not None:
        made = attempt.model_copy(update={"uid": seen.gang["metadata"]["uid"]})
        told = status.told(job, now, "Unknown", _being_made(attempt.number), attempts=status.record(job, made))
        event = Event("Normal", "Started", f"attempt {attempt.number} on {job.spec.distributed.nodes} pods")
        return Plan(status=told.dump(), release=seen.leavings, events=(event,), requeue_after=CHECK_SECONDS)
    if job.spec.suspend:
        return leave(seen, now, Reason.SUSPENDED, "spec.suspend was set to true")
    if (left := deadline(seen, now)) is not None and left <= 0:
        return leave(seen, now, Reason.DEADLINE_EXCEEDED, _too_late(seen))
    config = configure(seen, attempt.number)
    if isinstance(config, Unmet):
        told = status.told(job, now, "Unknown", Word(config.reason, config.message))
        return Plan(status=told.dump(), release=seen.leavings, requeue_after=WATCH_SECONDS)
    # What an earlier life left of this run.json may be of a spec that was mended since.
    return Plan(
        apply=(build.run_map(job, config),),
        create=tuple(build.attempt(job, config, seen.settings)),
        release=seen.leavings,
        requeue_after=0.0,
    )


def _too_late(seen: Seen) -> str:
    return f"activeDeadlineSeconds ({seen.job.spec.active_deadline_seconds} s) passed"


def _was_suspended(seen: Seen, now: datetime) -> int:
    """Seconds of the suspension that ends now; the deadline leaves them out."""
    found = status.find(seen.job, SUSPENDED)
    last = seen.last
    if found is None or last is None or last.reason != Reason.SUSPENDED or last.end_time is None:
        return 0
    return max(0, int((now - trouble.moment(last.end_time)).total_seconds()))


# ------------------------------------------------------------ while an attempt runs


def watch(seen: Seen, now: datetime) -> Plan:
    """An open attempt: success, an ending, or how far it is."""
    attempt = seen.attempt
    assert attempt is not None
    ends = gang.ends(seen.members)
    if success := _success(seen):
        return succeed(seen, now, success)
    if failure := next((end for end in ends if not end.succeeded), None):
        return leave(seen, now, failure.reason, status.sentence(failure.message, failure.hint, failure.reason), failure)
    if seen.gang is None:
        return leave(seen, now, Reason.PREEMPTED, f"PyTorchJob {_gang_name(seen)} was deleted by someone else")
    if seen.job.spec.suspend:
        return leave(seen, now, Reason.SUSPENDED, "spec.suspend was set to true")
    if (left := deadline(seen, now)) is not None and left <= 0:
        return leave(seen, now, Reason.DEADLINE_EXCEEDED, _too_late(seen))
    if ends and (refusal := _success_without_artifact(seen, ends)):
        return leave(seen, now, Reason.CRASHED, refusal)
    if gang.has_condition(seen.gang, "Failed") and not any(trouble.running(pod) for pod in seen.pods):
        return leave(seen, now, Reason.PREEMPTED, f"PyTorchJob {_gang_name(seen)} failed and its pods are gone")
    if not gang.complete(seen.members, seen.job.spec.distributed.nodes):
        return assemble(seen, now)
    if (silent := _silence(seen, now)) > seen.job.spec.hang_timeout_seconds:
        return leave(seen, now, Reason.STALLED, f"no step was reported for {silent:.0f} s")
    word = Word(Reason.RUNNING, f"attempt {attempt.number} runs on {len(seen.members)} pods")
    again = WATCH_SECONDS if left is None else max(1.0, min(WATCH_SECONDS, left))
    return _go_on(seen, now, word, again)


def _success(seen: Seen) -> PodEnd | None:
    """The end of the pod that published. One that was told to leave may have been done already."""
    ends = gang.ends(seen.pods)
    return next((end for end in ends if end.succeeded and end.ending and end.ending.artifact), None)


def _go_on(seen: Seen, now: datetime, word: Word, again: float) -> Plan:
    """The attempt goes on: say how far it is, mend what it lacks, and let go of those that the queue sent away."""
    return Plan(
        create=_mended(seen),
        status=_with_report(seen, now, word).dump(),
        release=(*seen.leavings, *(pod for pod in seen.evicted if trouble.ended(pod))),
        requeue_after=again,
    )


def _mended(seen: Seen) -> tuple[Object, ...]:
    """What somebody took away from under the gang."""
    attempt = seen.attempt
    assert attempt is not None
    config = configure(seen, attempt.number) if seen.missing else None
    if not isinstance(config, RunConfig):
        return ()
    made = build.lasting(seen.job, config)
    return tuple(each for each in made if (each["kind"], each["metadata"]["name"]) in seen.missing)


def assemble(seen: Seen, now: datetime) -> Plan:
    """Not every pod runs yet: say why, and let go of those that hold accelerators when it lasts."""
    attempt = seen.attempt
    assert attempt is not None
    if gang.queued(seen.gang):
        return _go_on(seen, now, Word(Reason.QUEUED, _held_by(seen)), WATCH_SECONDS)
    found = next((found for pod in seen.members if (found := trouble.of_pod(pod, seen.events))), None)
    found = found or _refused(seen)
    waited = (now - gang.assembling_since(seen.members, attempt.start_time)).total_seconds()
    if waited > seen.settings.start_timeout_seconds and gang.holds_nodes(seen.members):
        # What waits for its first node holds nothing, and must be seen to wait or no node is ever added.
        found = found or Trouble(Reason.PODS_REFUSED, f"the gang is not complete after {waited:.0f} s.")
        return leave(seen, now, found.reason, _remedied(found))
    up = sum(trouble.running(pod) for pod in seen.members)
    word = Word(Reason.PENDING, f"attempt {attempt.number}: {up} of {seen.job.spec.distributed.nodes} pods run")
    if found is not None:
        word = Word(found.reason, _remedied(found))
    return _go_on(seen, now, word, CHECK_SECONDS)


def _held_by(seen: Seen) -> str:
    queue = seen.job.metadata.labels.get(names.QUEUE)
    whose = f"its queue {queue}" if queue else "whoever set its runPolicy.suspend"
    return f"PyTorchJob {_gang_name(seen)} is held by {whose}"


def _refused(seen: Seen) -> Trouble | None:
    """training-operator could not make a pod. A master without workers makes its own init container suspect."""
    found = trouble.refused(seen.events, _gang_name(seen))
    if found is None or len(seen.members) >= seen.job.spec.distributed.nodes:
        return None
    if not seen.members:
        return found
    return Trouble(
        found.reason,
        f"{found.message} The master's pod was made and a worker's was not: in a namespace under the restricted Pod "
        "Security profile start training-operator with --pytorch-init-container-template-file, naming a template "
        "that the profile admits (docs/restricted-namespaces.md has one).",
    )


def _with_report(seen: Seen, now: datetime, word: Word) -> FineTuneJobStatus:
    attempt = seen.attempt
    assert attempt is not None
    return status.told(
        seen.job,
        now,
        "Unknown",
        word,
        attempts=status.record(seen.job, _stepped(seen, attempt, _last_words(seen.evicted))),
        **status.reported(seen.job, seen.report, attempt.number),
    )


def _last_words(pods: Sequence[Object]) -> PodEnd | None:
    """The first end among these that tells how far it came."""
    return next((end for end in gang.ends(pods) if end.ending is not None and end.ending.step is not None), None)


def _stepped(seen: Seen, attempt: Attempt, end: PodEnd | None = None) -> Attempt:
    """The attempt with the steps that its report, and at the end its last words, tell. It is never told to go back:
    the report of a pod that the queue sent away stays until the next one writes its own."""
    steps: dict[str, Any] = {}
    report = seen.report if seen.report and seen.report.attempt == attempt.number else None
    if report is not None and report.from_step is not None:
        steps["from_step"] = report.from_step
    if end is not None and end.ending is not None and end.ending.from_step is not None:
        steps["from_step"] = end.ending.from_step
    reported = report.progress.step if report is not None and report.progress is not None else None
    said = end.ending.step if end is not None and end.ending is not None else None
    reached = [each for each in (attempt.to_step, reported, said) if each is not None]
    if reached:
        steps["to_step"] = max(reached)
    return attempt.model_copy(update=steps)


def deadline(seen: Seen, now: datetime) -> float | None:
    """Seconds until activeDeadlineSeconds pass; time suspended or held by a queue is left out."""
    known, limit = status.of(seen.job), seen.job.spec.active_deadline_seconds
    if limit is None or known.start_time is None:
        return None
    held = known.suspended_seconds + status.queued_for(seen.job, now)
    return limit - (now - trouble.moment(known.start_time)).total_seconds() + held


def _silence(seen: Seen, now: datetime) -> float:
    """Seconds since the attempt was last heard of."""
    attempt = seen.attempt
    assert attempt is not None
    heard = [trouble.moment(attempt.start_time)]
    progress = seen.report.progress if seen.report and seen.report.attempt == attempt.number else None
    if progress is not None and progress.updated_time is not None:
        heard.append(trouble.moment(progress.updated_time))
    for pod in seen.members:
        for container in pod.get("status", {}).get("containerStatuses") or []:
            if started := container.get("state", {}).get("running", {}).get("startedAt"):
                heard.append(trouble.moment(started))
    return (now - max(heard)).total_seconds()


def _success_without_artifact(seen: Seen, ends: list[PodEnd]) -> str | None:
    """All pods say success and none names an artifact: no digest, no success."""
    if len(ends) < seen.job.spec.distributed.nodes or any(not end.succeeded for end in ends):
        return None
    return "every pod ended well and none named an artifact"


def _gang_name(seen: Seen) -> str:
    attempt = seen.attempt
    return names.pytorchjob(seen.job.metadata.name, attempt.number if attempt else 0)


def _remedied(found: Trouble) -> str:
    return status.sentence(found.message, "", found.reason)


# ------------------------------------------------------------ endings


def leave(seen: Seen, now: datetime, reason: Reason, message: str, end: PodEnd | None = None) -> Plan:
    """The attempt ends with this reason: write it down, then send the rest of the gang away."""
    attempt = seen.attempt
    assert attempt is not None
    ending = _stepped(seen, attempt, end).model_copy(
        update={
            "reason": reason.value,
            "message": status.cut(message),
            "exit_code": end.exit_code if end else None,
            "hint": status.cut(end.hint) if end and end.hint else None,
        }
    )
    if not gang.alive(seen.pods, now):
        return close(seen, now, ending)
    told = status.told(
        seen.job,
        now,
        "Unknown",
        Word(
            Reason.RESTARTING if reason is not Reason.SUSPENDED else Reason.SUSPENDED,
            f"{message} The pods are leaving.",
        ),
        attempts=status.record(seen.job, ending),
        **status.reported(seen.job, seen.report, attempt.number),
    )
    # What failed by itself is cleaned up by training-operator, which keeps the failed pod and its log.
    gone = () if ending.exit_code is not None else _gang_ref(seen)
    return Plan(status=told.dump(), release=seen.leavings, delete=gone, requeue_after=CLOSING_SECONDS)


def closing(seen: Seen, now: datetime) -> Plan:
    """The gang is on its way out; its last words still count."""
    attempt = seen.attempt
    assert attempt is not None
    if success := _success(seen):
        return succeed(seen, now, success)
    if gang.alive(seen.pods, now):
        begun = min((gang.began_to_end(pod) for pod in seen.pods), default=now)
        cleaning = attempt.exit_code is not None and (now - begun).total_seconds() < CLEANING_SECONDS
        gone = () if cleaning else _gang_ref(seen)
        return Plan(release=seen.leavings, delete=gone, requeue_after=CLOSING_SECONDS)
    return close(seen, now, _stepped(seen, attempt, _last_words(seen.pods)))


def close(seen: Seen, now: datetime, attempt: Attempt) -> Plan:
    """No pod of the attempt lives: count it, and decide whether there is another."""
    known, reason = status.of(seen.job), Reason(attempt.reason or Reason.CRASHED)
    ended = attempt.model_copy(update={"end_time": status.stamp(now)})
    lowered = outofmemory.smaller(seen.job) if reason is Reason.OUT_OF_MEMORY else None
    # What goes on with less repeats nothing, so it is no retry; but none at all are no further attempts at all.
    billed = lowered is None or seen.job.spec.retries.limit == 0
    failures = known.failures + (billed and reason not in NOT_BILLED and reason is not Reason.PREEMPTED)
    preemptions = known.preemptions + (reason is Reason.PREEMPTED)
    changes: dict[str, Any] = {
        "attempts": status.record(seen.job, ended),
        "failures": failures,
        "preemptions": preemptions,
        **status.reported(seen.job, seen.report, attempt.number),
    }
    message = attempt.message or ""
    if verdict := _given_up(seen, attempt, failures, preemptions):
        told = status.told(
            seen.job, now, "False", Word(reason, f"{message} {verdict}"), completion_time=status.stamp(now), **changes
        )
        event = Event("Warning", reason, message)
    elif reason is Reason.SUSPENDED:
        word = Word(Reason.SUSPENDED, "spec.suspend is true; no pod is held. Set it to false to go on.")
        told = status.told(seen.job, now, "Unknown", word, **changes)
        event = Event("Normal", reason, f"attempt {attempt.number} ended after its checkpoint")
    else:
        if lowered is not None:
            changes["resolved"] = lowered
            message = f"{message} {outofmemory.told(seen.job, lowered)}".lstrip()
        word = Word(Reason.RESTARTING, f"attempt {attempt.number} ended: {reason}: {message}")
        told = status.told(seen.job, now, "Unknown", word, **changes)
        event = Event("Warning", reason, f"attempt {attempt.number} ended: {message}")
    return Plan(
        status=told.dump(),
        release=(*seen.leavings, *seen.pods),
        # A gang that has not failed yet would have its pods made again once they are let go.
        delete=() if gang.has_condition(seen.gang, "Failed") else _gang_ref(seen),
        events=(event,),
        requeue_after=0.2,
    )


def _given_up(seen: Seen, attempt: Attempt, failures: int, preemptions: int) -> str | None:
    """Why there is no further attempt; None when there is one."""
    reason, retries = Reason(attempt.reason or Reason.CRASHED), seen.job.spec.retries
    if reason in FINAL:
        return "Another attempt would end the same way."
    if reason is Reason.OUT_OF_MEMORY and not outofmemory.smaller(seen.job) and outofmemory.hopeless(seen.job, attempt):
        return outofmemory.remedy(seen.job)
    if reason not in NOT_BILLED and reason is not Reason.PREEMPTED and failures > retries.limit:
        return f"retries.limit ({retries.limit}) is used up."
    if reason is Reason.PREEMPTED and preemptions > retries.preemptions:
        return f"retries.preemptions ({retries.preemptions}) is used up."
    if status.of(seen.job).attempt >= names.ATTEMPT_LIMIT:
        return f"{names.ATTEMPT_LIMIT} attempts are the most there can be."
    return None


def succeed(seen: Seen, now: datetime, end: PodEnd) -> Plan:
    """An artifact with a digest: the job is done."""
    attempt = seen.attempt
    assert attempt is not None
    assert end.ending is not None
    assert end.ending.artifact is not None
    if gang.alive(seen.pods, now) and not attempt.reason and any(_fresh(pod, now) for pod in seen.pods):
        return Plan(status=None, release=seen.leavings, requeue_after=1.0)
    done = _stepped(seen, attempt, end).model_copy(
        update={"reason": Reason.SUCCEEDED.value, "end_time": status.stamp(now), "exit_code": 0, "message": None}
    )
    changes = status.reported(seen.job, seen.report, attempt.number)
    progress = status.complete(changes.pop("progress", None) or status.of(seen.job).progress, end.ending.step)
    artifact = end.ending.artifact
    told = status.told(
        seen.job,
        now,
        "True",
        Word(Reason.SUCCEEDED, f"{artifact.kind} {artifact.digest[:19]} is at {artifact.uri}"),
        attempts=status.record(seen.job, done),
        progress=progress,
        artifact=artifact,
        completion_time=status.stamp(now),
        **changes,
    )
    return Plan(
        status=told.dump(),
        release=(*seen.leavings, *seen.pods),
        events=(Event("Normal", Reason.SUCCEEDED, f"published {artifact.uri}"),),
        requeue_after=1.0,
    )


FRESH_SECONDS = 10.0
"""How long the other pods are given to end by themselves once the master has published."""


def _fresh(pod: dict[str, Any], now: datetime) -> bool:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if at := container.get("state", {}).get("terminated", {}).get("finishedAt"):
            return (now - trouble.moment(at)).total_seconds() < FRESH_SECONDS
    return False


def _gang_ref(seen: Seen) -> tuple[Ref, ...]:
    if seen.gang is None or seen.gang["metadata"].get("deletionTimestamp"):
        return ()
    return (_ref(seen.gang),)


def _ref(found: Object) -> Ref:
    meta = found["metadata"]
    return Ref(found["kind"], meta["namespace"], meta["name"], uid=meta["uid"])


def retain(seen: Seen, now: datetime) -> Plan:
    """The job has ended: let its pods go, and the resource itself when its time is over."""
    job, known = seen.job, status.of(seen.job)
    ttl = job.spec.ttl_seconds_after_finished
    if ttl is None or known.completion_time is None:
        return Plan(release=seen.leavings)
    left = ttl - (now - trouble.moment(known.completion_time)).total_seconds()
    if left > 0:
        return Plan(release=seen.leavings, requeue_after=left)
    meta = job.metadata
    return Plan(release=seen.leavings, delete=(Ref("FineTuneJob", meta.namespace, meta.name, uid=meta.uid),))
