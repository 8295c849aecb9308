"""What should happen to a FineTuneJob now. Pure: plan(seen, now) reads no clock, no client and no event.

An attempt is open (no end, no reason), ending (a reason, no end: its gang is on its way out) or closed (an end). It
stands in status before anything of it is made, which fixes the spec that it is made from; the UID of its PyTorchJob
says that it was made. Everything that must survive the operator between two looks stands in status.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_operator import trouble
from trimtab_operator.finetunejob import ending, facts, running, starting, status
from trimtab_operator.finetunejob.seen import Seen, finished
from trimtab_operator.finetunejob.status import Word
from trimtab_operator.plan import Plan, Ref


def plan(seen: Seen, now: datetime) -> Plan:
    """The next step, read from top to bottom as a checklist."""
    if seen.job.metadata.deletion_timestamp:
        return Plan(release=seen.leavings)
    if finished(seen.job):
        return retain(seen, now)
    if seen.attempt is not None and seen.attempt.reason:
        return ending.closing(seen, now)
    if seen.attempt is not None:
        return running.watch(seen, now) if seen.attempt.uid else starting.make(seen, now, seen.attempt)
    if (left := facts.deadline(seen, now)) is not None and left <= 0 and not seen.job.spec.suspend:
        return starting.expire(seen, now)
    if seen.job.spec.suspend:
        return starting.pause(seen, now)
    if (wait := starting.pace(seen, now)) > 0:
        return Plan(release=seen.leavings, requeue_after=wait)
    return starting.begin(seen, now)


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
