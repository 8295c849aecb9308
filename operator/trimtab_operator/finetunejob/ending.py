"""How an attempt ends: it is written down, its gang goes, and then there is another one, or the job is over. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_operator import trouble
from trimtab_operator.finetunejob import facts, gang, outofmemory, status
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.finetunejob.status import Word
from trimtab_operator.plan import Event, Plan
from trimtab_operator.trouble import PodEnd

CLOSING_SECONDS = 2.0
"""Pace of looking while a gang goes away."""

CLEANING_SECONDS = 30.0
"""After a failure training-operator sends the rest of the gang away; after this long it is done for it."""

FRESH_SECONDS = 10.0
"""How long the other pods are given to end by themselves once the master has published."""

NOT_BILLED = frozenset(
    {
        Reason.SUSPENDED, Reason.UNSCHEDULABLE, Reason.PODS_REFUSED, Reason.IMAGE_UNAVAILABLE,
        Reason.VOLUME_UNAVAILABLE,
    }
)  # fmt: skip
"""Endings that are nobody's failure: the gang never ran, or the user stopped it."""

FINAL = frozenset({Reason.SPEC_INVALID, Reason.ASSERTION_FAILED, Reason.DEADLINE_EXCEEDED})
"""Endings that another attempt would only repeat."""


def leave(seen: Seen, now: datetime, reason: Reason, message: str, end: PodEnd | None = None) -> Plan:
    """The attempt ends with this reason: write it down, then send the rest of the gang away."""
    attempt = seen.attempt
    assert attempt is not None
    ending = facts.stepped(seen, attempt, end).model_copy(
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
    gone = () if ending.exit_code is not None else facts.gang_ref(seen)
    return Plan(status=told.dump(), release=seen.leavings, delete=gone, requeue_after=CLOSING_SECONDS)


def closing(seen: Seen, now: datetime) -> Plan:
    """The gang is on its way out; its last words still count."""
    attempt = seen.attempt
    assert attempt is not None
    if success := facts.success(seen):
        return succeed(seen, now, success)
    if gang.alive(seen.pods, now):
        begun = min((gang.began_to_end(pod) for pod in seen.pods), default=now)
        cleaning = attempt.exit_code is not None and (now - begun).total_seconds() < CLEANING_SECONDS
        gone = () if cleaning else facts.gang_ref(seen)
        return Plan(release=seen.leavings, delete=gone, requeue_after=CLOSING_SECONDS)
    return close(seen, now, facts.stepped(seen, attempt, facts.last_words(seen.pods)))


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
        delete=() if gang.has_condition(seen.gang, "Failed") else facts.gang_ref(seen),
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
    done = facts.stepped(seen, attempt, end).model_copy(
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
        predictions=end.ending.predictions,
        completion_time=status.stamp(now),
        **changes,
    )
    return Plan(
        status=told.dump(),
        release=(*seen.leavings, *seen.pods),
        events=(Event("Normal", Reason.SUCCEEDED, f"published {artifact.uri}"),),
        requeue_after=1.0,
    )


def _fresh(pod: dict[str, Any], now: datetime) -> bool:
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if at := container.get("state", {}).get("terminated", {}).get("finishedAt"):
            return (now - trouble.moment(at)).total_seconds() < FRESH_SECONDS
    return False
