"""Folds what is known of a FineTuneJob into its status: one verdict, the attempts, and what pods said within bounds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from trimtab_api.conditions import INPUTS_SOUND, RUNBOOK, SUCCEEDED, SUSPENDED, Reason
from trimtab_api.contract import ProgressReport
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.progress import Attempt, CheckpointRecord, FineTuneJobStatus, Progress
from trimtab_api.v1alpha1.status import MESSAGE_LIMIT, Condition
from trimtab_operator import trouble

State = Literal["True", "False", "Unknown"]
ATTEMPTS_KEPT = 32
CHECKPOINTS_KEPT = 16
LARGEST = 2**53
"""Numbers beyond it are not believed: a status cannot hold them exactly."""


@dataclass(frozen=True)
class Word:
    """A reason and its sentence."""

    reason: Reason
    message: str = ""


def of(job: FineTuneJob) -> FineTuneJobStatus:
    """The status so far."""
    return job.status or FineTuneJobStatus()


def stamp(now: datetime) -> str:
    """A moment as the API server writes it."""
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def told(job: FineTuneJob, now: datetime, state: State, word: Word, **changes: Any) -> FineTuneJobStatus:
    """The status so far with the leading condition, the suspension, and whatever else changed."""
    old = of(job)
    conditions = {each.type: each for each in changes.pop("conditions", old.conditions)}
    conditions[SUCCEEDED] = condition(job, SUCCEEDED, state, word, now)
    held = _held(job, word)
    if held is not None or SUSPENDED in conditions:
        asked: State = "True" if held is not None else "False"
        conditions[SUSPENDED] = condition(job, SUSPENDED, asked, Word(held or Reason.RUNNING), now)
    if word.reason is not Reason.QUEUED:
        changes["suspended_seconds"] = changes.get("suspended_seconds", old.suspended_seconds) + queued_for(job, now)
    order = (SUCCEEDED, INPUTS_SOUND, SUSPENDED)
    return old.model_copy(
        update={
            "observed_generation": job.metadata.generation,
            "conditions": [conditions[kind] for kind in order if kind in conditions],
            **changes,
        }
    )


def _held(job: FineTuneJob, word: Word) -> Reason | None:
    """What keeps the job from running, if it is somebody's will."""
    if job.spec.suspend:
        return Reason.SUSPENDED
    return Reason.QUEUED if word.reason is Reason.QUEUED else None


def queued_for(job: FineTuneJob, now: datetime) -> int:
    """Seconds for which a queue has held the job by now, not counted yet."""
    found = find(job, SUSPENDED)
    if found is None or found.status != "True" or found.reason != Reason.QUEUED:
        return 0
    return max(0, int((now - trouble.moment(found.last_transition_time)).total_seconds()))


def with_inputs(job: FineTuneJob, state: State, word: Word, now: datetime) -> list[Condition]:
    """The conditions with the preflight's verdict told anew."""
    others = [each for each in of(job).conditions if each.type != INPUTS_SOUND]
    return [*others, condition(job, INPUTS_SOUND, state, word, now)]


def find(job: FineTuneJob, kind: str) -> Condition | None:
    """One condition of the status so far."""
    return next((each for each in of(job).conditions if each.type == kind), None)


def condition(job: FineTuneJob, kind: str, state: State, word: Word, now: datetime) -> Condition:
    """A condition; its time stays while its status does."""
    old = find(job, kind)
    return Condition(
        type=kind,
        status=state,
        reason=word.reason,
        message=cut(word.message),
        last_transition_time=old.last_transition_time if old is not None and old.status == state else stamp(now),
        observed_generation=job.metadata.generation,
    )


def cut(text: str) -> str:
    """A message within the bounds of a status."""
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def sentence(message: str, hint: str, reason: Reason) -> str:
    """What is wrong and what to do: the pod's own hint, or the runbook's."""
    remedy = hint or RUNBOOK[reason].remedy
    return f"{message.rstrip('. ')}. {remedy}" if message else f"{RUNBOOK[reason].meaning} {remedy}"


def record(job: FineTuneJob, attempt: Attempt) -> list[Attempt]:
    """The newest attempts with this one in its place."""
    others = [each for each in of(job).attempts if each.number != attempt.number]
    return sorted([*others, attempt], key=lambda each: each.number)[-ATTEMPTS_KEPT:]


# ------------------------------------------------------------ what pods say


def believed(text: str | None, attempt: int) -> ProgressReport | None:
    """A report of this attempt that keeps to the contract and that the API server will take; None for any other."""
    try:
        document = json.loads(text or "", parse_constant=lambda _: None)
        report = ProgressReport.read(_sane(document))
    except (ValueError, TypeError, RecursionError, ValidationError):
        return None
    if report.attempt != attempt:
        return None
    moment = report.progress.updated_time if report.progress else None
    return report if moment is None or _is_moment(moment) else None


def _sane(value: Any) -> Any:
    """The value without numbers that no status can hold: they become null, like those that were never said."""
    if isinstance(value, dict):
        return {key: sane for key, inner in value.items() if (sane := _sane(inner)) is not None}
    if isinstance(value, list):
        return [_sane(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > LARGEST:
        return None
    return value


def _is_moment(text: str) -> bool:
    try:
        return trouble.moment(text).tzinfo is not None
    except ValueError:
        return False


def reported(job: FineTuneJob, report: ProgressReport | None, attempt: int) -> dict[str, Any]:
    """What a believable report changes: progress, checkpoints, and the step that the attempt went on from."""
    if report is None or report.attempt != attempt:
        return {}
    changes: dict[str, Any] = {}
    if report.progress is not None:
        changes["progress"] = report.progress
    if report.checkpoints:
        known = {each.step: each for each in report.checkpoints}
        newest = sorted(known)[-CHECKPOINTS_KEPT:]
        changes["checkpoints"] = [
            CheckpointRecord(step=step, uri=known[step].uri, digest=known[step].digest) for step in newest
        ]
    return changes


def complete(progress: Progress | None, reached: int | None) -> Progress | None:
    """The progress of a job that has succeeded at step `reached`, before the last one when it ended early."""
    if progress is None:
        return None
    step = progress.total_steps if reached is None else min(reached, progress.total_steps)
    return progress.model_copy(
        update={
            "step": step,
            "steps": f"{step}/{progress.total_steps}",
            "eta_seconds": 0,
            "eta": "",
        }
    )
