"""While an attempt runs: success, an ending, or how far it is. Pure."""

from __future__ import annotations

from datetime import datetime
from functools import partial

from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.progress import FineTuneJobStatus
from trimtab_operator import trouble
from trimtab_operator.finetunejob import build, ending, facts, gang, status
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.finetunejob.status import Word
from trimtab_operator.plan import Object, Plan
from trimtab_operator.trouble import PodEnd, Trouble


def watch(seen: Seen, now: datetime) -> Plan:
    """An open attempt: success, an ending, or how far it is."""
    attempt = seen.attempt
    assert attempt is not None
    leave, ends, name = partial(ending.leave, seen, now), gang.ends(seen.members), facts.gang_name(seen)
    if success := facts.success(seen):
        return ending.succeed(seen, now, success)
    if failure := next((end for end in ends if not end.succeeded), None):
        return leave(failure.reason, status.sentence(failure.message, failure.hint, failure.reason), failure)
    if seen.gang is None:
        return leave(Reason.PREEMPTED, f"PyTorchJob {name} was deleted by someone else")
    if seen.job.spec.suspend:
        return leave(Reason.SUSPENDED, "spec.suspend was set to true")
    if (left := facts.deadline(seen, now)) is not None and left <= 0:
        return leave(Reason.DEADLINE_EXCEEDED, facts.too_late(seen))
    if ends and (refusal := _success_without_artifact(seen, ends)):
        return leave(Reason.CRASHED, refusal)
    if gang.has_condition(seen.gang, "Failed") and not any(trouble.running(pod) for pod in seen.members):
        why = "its queue let it run while pods were leaving" if seen.evicted else "its pods are gone"
        return leave(Reason.PREEMPTED, f"PyTorchJob {name} failed: {why}")
    if not gang.complete(seen.members, seen.job.spec.distributed.nodes):
        return assemble(seen, now)
    if (silent := _silence(seen, now)) > seen.job.spec.hang_timeout_seconds:
        return leave(Reason.STALLED, f"no step was reported for {silent:.0f} s")
    word = Word(Reason.RUNNING, f"attempt {attempt.number} runs on {len(seen.members)} pods")
    again = facts.WATCH_SECONDS if left is None else max(1.0, min(facts.WATCH_SECONDS, left))
    return _go_on(seen, now, word, again)


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
    config = facts.configure(seen, attempt.number) if seen.missing else None
    if not isinstance(config, RunConfig):
        return ()
    made = build.lasting(seen.job, config)
    return tuple(each for each in made if (each["kind"], each["metadata"]["name"]) in seen.missing)


def assemble(seen: Seen, now: datetime) -> Plan:
    """Not every pod runs yet: say why, and let go of those that hold accelerators when it lasts."""
    attempt = seen.attempt
    assert attempt is not None
    if gang.queued(seen.gang):
        return _go_on(seen, now, Word(Reason.QUEUED, _held_by(seen)), facts.WATCH_SECONDS)
    found = next((found for pod in seen.members if (found := trouble.of_pod(pod, seen.events))), None)
    found = found or _refused(seen)
    waited = (now - gang.assembling_since(seen.members, attempt.start_time)).total_seconds()
    if waited > seen.settings.start_timeout_seconds and gang.holds_nodes(seen.members):
        # What waits for its first node holds nothing, and must be seen to wait or no node is ever added.
        found = found or Trouble(Reason.PODS_REFUSED, f"the gang is not complete after {waited:.0f} s.")
        return ending.leave(seen, now, found.reason, facts.remedied(found))
    up = sum(trouble.running(pod) for pod in seen.members)
    word = Word(Reason.PENDING, f"attempt {attempt.number}: {up} of {seen.job.spec.distributed.nodes} pods run")
    if found is not None:
        word = Word(found.reason, facts.remedied(found))
    return _go_on(seen, now, word, facts.CHECK_SECONDS)


def _held_by(seen: Seen) -> str:
    queue = seen.job.metadata.labels.get(names.QUEUE)
    whose = f"its queue {queue}" if queue else "whoever set its runPolicy.suspend"
    return f"PyTorchJob {facts.gang_name(seen)} is held by {whose}"


def _refused(seen: Seen) -> Trouble | None:
    """training-operator could not make a pod. A master without workers makes its own init container suspect."""
    found = trouble.refused(seen.events, facts.gang_name(seen))
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
        attempts=status.record(seen.job, facts.stepped(seen, attempt, facts.last_words(seen.evicted))),
        **status.reported(seen.job, seen.report, attempt.number),
    )


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
