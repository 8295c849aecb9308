"""What the rooms that decide on a FineTuneJob ask of what was seen. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from trimtab_api import names
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_operator import trouble
from trimtab_operator.finetunejob import build, gang, status
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.plan import Object, Ref
from trimtab_operator.sources import Unmet
from trimtab_operator.trouble import PodEnd, Trouble

CHECK_SECONDS = 3.0
"""Pace of looking while pods start: their warnings wake nobody."""
WATCH_SECONDS = 30.0
"""Pace of looking while pods run: for deadlines and hangs."""


def configure(seen: Seen, number: int) -> RunConfig | Unmet:
    """What the pods of this attempt are told. Inputs and image are those that the first attempt pinned."""
    known = status.of(seen.job)
    pinned = known.resolved
    image = (pinned.image if pinned else None) or seen.settings.images.trainer
    pins = pinned.inputs if pinned and known.start_time else ()
    return build.run_config(seen.job, seen.settings, seen.producers, number, image, pins)


def deadline(seen: Seen, now: datetime) -> float | None:
    """Seconds until activeDeadlineSeconds pass; time suspended or held by a queue is left out."""
    known, limit = status.of(seen.job), seen.job.spec.active_deadline_seconds
    if limit is None or known.start_time is None:
        return None
    held = known.suspended_seconds + status.queued_for(seen.job, now)
    return limit - (now - trouble.moment(known.start_time)).total_seconds() + held


def too_late(seen: Seen) -> str:
    """What is said when the deadline has passed."""
    return f"activeDeadlineSeconds ({seen.job.spec.active_deadline_seconds} s) passed"


def gang_name(seen: Seen) -> str:
    """The PyTorchJob of the open attempt."""
    attempt = seen.attempt
    return names.pytorchjob(seen.job.metadata.name, attempt.number if attempt else 0)


def remedied(found: Trouble) -> str:
    """What keeps a pod from running, with the runbook's remedy."""
    return status.sentence(found.message, "", found.reason)


def success(seen: Seen) -> PodEnd | None:
    """The end of the pod that published. One that was told to leave may have been done already."""
    ends = gang.ends(seen.pods)
    return next((end for end in ends if end.succeeded and end.ending and end.ending.artifact), None)


def last_words(pods: Sequence[Object]) -> PodEnd | None:
    """The first end among these that tells how far it came."""
    return next((end for end in gang.ends(pods) if end.ending is not None and end.ending.step is not None), None)


def stepped(seen: Seen, attempt: Attempt, end: PodEnd | None = None) -> Attempt:
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


def ref(found: Object) -> Ref:
    """An object as it is deleted: by its UID."""
    meta = found["metadata"]
    return Ref(found["kind"], meta["namespace"], meta["name"], uid=meta["uid"])


def gang_ref(seen: Seen) -> tuple[Ref, ...]:
    """The PyTorchJob, unless it is on its way out."""
    if seen.gang is None or seen.gang["metadata"].get("deletionTimestamp"):
        return ()
    return (ref(seen.gang),)
