"""Folds what is known of a merge into its status: one verdict, the attempts, and what the pod said within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from trimtab_api.conditions import SUCCEEDED, Reason
from trimtab_api.v1alpha1 import MergeJob
from trimtab_api.v1alpha1.mergejob import MergeJobStatus
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_api.v1alpha1.status import MESSAGE_LIMIT, Condition

State = Literal["True", "False", "Unknown"]
ATTEMPTS_KEPT = 16


def of(job: MergeJob) -> MergeJobStatus:
    """The status so far."""
    return job.status or MergeJobStatus()


def told(
    job: MergeJob,
    now: str,
    state: State,
    reason: Reason,
    message: str,
    beside: Sequence[Condition] = (),
    **changes: Any,
) -> MergeJobStatus:
    """The status so far with the leading condition, those beside it, and what fields changed. `now` is RFC 3339."""
    conditions = {each.type: each for each in of(job).conditions}
    for each in (condition(job, SUCCEEDED, state, reason, message, now), *beside):
        conditions[each.type] = each
    update = {"observed_generation": job.metadata.generation, "conditions": list(conditions.values()), **changes}
    return of(job).model_copy(update=update)


def condition(job: MergeJob, kind: str, state: State, reason: Reason, message: str, now: str) -> Condition:
    """A condition; its time stays while its status does."""
    old = find(job, kind)
    return Condition(
        type=kind,
        status=state,
        reason=reason,
        message=message[:MESSAGE_LIMIT],
        last_transition_time=old.last_transition_time if old is not None and old.status == state else now,
        observed_generation=job.metadata.generation,
    )


def find(job: MergeJob, kind: str) -> Condition | None:
    """One condition of the status so far."""
    return next((each for each in of(job).conditions if each.type == kind), None)


def attempt(job: MergeJob, number: int) -> Attempt | None:
    """One attempt of the status so far."""
    return next((each for each in of(job).attempts if each.number == number), None)


def record(attempts: Sequence[Attempt], new: Attempt) -> list[Attempt]:
    """The newest attempts with this one in its place."""
    others = [each for each in attempts if each.number != new.number]
    return sorted([*others, new], key=lambda each: each.number)[-ATTEMPTS_KEPT:]
