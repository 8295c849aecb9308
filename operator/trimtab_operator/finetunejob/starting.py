"""Before an attempt: its inputs are looked at, it is written into status, and made. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from trimtab_api import names
from trimtab_api.conditions import INPUTS_SOUND, SUSPENDED, Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_api.v1alpha1.status import Condition
from trimtab_operator import trouble
from trimtab_operator.finetunejob import build, ending, facts, status
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.finetunejob.status import Word
from trimtab_operator.plan import Event, Plan, Ref
from trimtab_operator.sources import Unmet
from trimtab_operator.trouble import PodEnd

RECHECK_SECONDS = (5.0, 300.0)
"""Shortest and longest wait before inputs are looked at again: half as long as they have been wrong."""

REFUSED_SECONDS = 15.0
"""Wait before an attempt that could not be made is begun again; a changed spec ends it."""

STUCK_SECONDS = 10.0
"""What a pod is given to find the Secret, claim or image that it lacks, beyond the time between two looks."""

MENDED_BY_USER = frozenset({Reason.CREDENTIALS_MISSING, Reason.VOLUME_UNAVAILABLE, Reason.IMAGE_UNAVAILABLE})
"""What keeps a preflight's pod from starting until somebody makes what it mounts or pulls."""

INPUTS = frozenset(
    {
        Reason.BUCKET_MISSING, Reason.OBJECT_MISSING, Reason.CREDENTIALS_MISSING, Reason.CREDENTIALS_WRONG,
        Reason.STORAGE_UNREACHABLE, Reason.DATA_INVALID, Reason.DATA_EMPTY, Reason.MODEL_INVALID,
        Reason.CHAT_TEMPLATE_MISSING, Reason.BASE_MISMATCH, Reason.INPUT_CHANGED, Reason.DIGEST_MISMATCH,
        Reason.NOT_AN_ARTIFACT,
    }
)  # fmt: skip
"""Endings that a mended input cures: the inputs are looked at again before the next attempt."""


def expire(seen: Seen, now: datetime) -> Plan:
    """The deadline passed between two attempts."""
    word = Word(Reason.DEADLINE_EXCEEDED, f"{facts.too_late(seen)}. No further attempt is made.")
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
    if last.reason in ending.NOT_BILLED:
        row = sum(each.reason in ending.NOT_BILLED for each in known.attempts) + 2
    wait = min(600.0, 5.0 * 2.0 ** min(row, 10))
    if last.number > known.attempt:  # it was taken back
        wait = REFUSED_SECONDS if known.observed_generation == seen.job.metadata.generation else 0.0
    return (trouble.moment(last.end_time) + timedelta(seconds=wait) - now).total_seconds()


def begin(seen: Seen, now: datetime) -> Plan:
    """Resolve, check the inputs, then start the next attempt."""
    known = status.of(seen.job)
    config = facts.configure(seen, known.attempt + 1)
    if isinstance(config, Unmet):
        # Told apart from a preflight's finding, which has looked at the inputs: nothing was looked at here.
        told = status.told(seen.job, now, "Unknown", Word(config.reason, config.message))
        return Plan(status=told.dump(), release=seen.leavings, delete=_preflight_ref(seen))
    if known.start_time is not None and seen.last is not None and seen.last.reason not in INPUTS:
        return start(seen, now, config)
    return check(seen, now, config)


def check(seen: Seen, now: datetime, config: RunConfig) -> Plan:
    """Have the inputs looked at by a small pod, before any accelerator is asked for."""
    job = seen.job
    hashed = build.inputs_hash(config, status.of(job).failures)
    checking = status.told(job, now, "Unknown", _checking(seen)).dump()
    if seen.preflight is None:
        made = build.preflight(job, config.model_copy(update={"attempt": 0}), seen.settings, hashed)
        return Plan(
            create=(made[1],),
            apply=(made[0],),
            status=checking,
            release=seen.leavings,
            requeue_after=facts.CHECK_SECONDS,
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
        word = Word(found.reason, facts.remedied(found)) if found else _checking(seen)
        told = status.told(seen.job, now, "Unknown", word)
        return Plan(status=told.dump(), release=seen.leavings, requeue_after=facts.CHECK_SECONDS)
    # The kubelet tries mounts and pulls ever more rarely; a new pod is tried at once.
    word = Word(found.reason, facts.remedied(found))
    conditions = status.with_inputs(seen.job, "False", word, now)
    stood = (now - trouble.moment(seen.preflight["metadata"]["creationTimestamp"])).total_seconds()
    stuck = stood > STUCK_SECONDS + _recheck_after(conditions, now)
    return Plan(
        status=status.told(seen.job, now, "Unknown", word, conditions=conditions).dump(),
        release=seen.leavings,
        delete=_preflight_ref(seen) if stuck else (),
        requeue_after=facts.CHECK_SECONDS,
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
        return Plan(delete=tuple(facts.ref(each) for each in seen.needless), requeue_after=0.0)
    if seen.gang is not None:
        made = attempt.model_copy(update={"uid": seen.gang["metadata"]["uid"]})
        told = status.told(job, now, "Unknown", _being_made(attempt.number), attempts=status.record(job, made))
        event = Event("Normal", "Started", f"attempt {attempt.number} on {job.spec.distributed.nodes} pods")
        return Plan(status=told.dump(), release=seen.leavings, events=(event,), requeue_after=facts.CHECK_SECONDS)
    if job.spec.suspend:
        return ending.leave(seen, now, Reason.SUSPENDED, "spec.suspend was set to true")
    if (left := facts.deadline(seen, now)) is not None and left <= 0:
        return ending.leave(seen, now, Reason.DEADLINE_EXCEEDED, facts.too_late(seen))
    config = facts.configure(seen, attempt.number)
    if isinstance(config, Unmet):
        told = status.told(job, now, "Unknown", Word(config.reason, config.message))
        return Plan(status=told.dump(), release=seen.leavings, requeue_after=facts.WATCH_SECONDS)
    # What an earlier life left of this run.json may be of a spec that was mended since.
    return Plan(
        apply=(build.run_map(job, config),),
        create=tuple(build.attempt(job, config, seen.settings)),
        release=seen.leavings,
        requeue_after=0.0,
    )


def _was_suspended(seen: Seen, now: datetime) -> int:
    """Seconds of the suspension that ends now; the deadline leaves them out."""
    found = status.find(seen.job, SUSPENDED)
    last = seen.last
    if found is None or last is None or last.reason != Reason.SUSPENDED or last.end_time is None:
        return 0
    return max(0, int((now - trouble.moment(last.end_time)).total_seconds()))
