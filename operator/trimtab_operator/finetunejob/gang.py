"""Reads a gang: is it complete, does it live, how did it end. Pure.

When one rank goes, the others fail after it, so the ends of a gang are put in order: what names a cause stands before
what may only follow from another's end, and among those the first in time leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from trimtab_api.conditions import Reason
from trimtab_operator import trouble
from trimtab_operator.finetunejob import build
from trimtab_operator.plan import Object
from trimtab_operator.trouble import SIGKILL, PodEnd

LOST_SECONDS = 60.0
"""A pod that has not ended this long after its grace period is taken for lost with its node."""

_FOLLOWS = frozenset({Reason.PREEMPTED, Reason.CRASHED, Reason.STALLED})
"""Ends that another pod's end may have brought about."""


def ends(pods: Sequence[Object]) -> list[PodEnd]:
    """How the pods ended, the cause first; pods that live are left out."""
    found = [(pod, end) for pod in pods if (end := trouble.end_of(pod, build.CONTAINER)) is not None]
    return [end for _, end in sorted(found, key=lambda each: _weight(*each))]


def _weight(pod: Object, end: PodEnd) -> tuple[bool, datetime, int, str]:
    """Cause before consequence, then time; the server's clock counts seconds, so a tie is broken by likelihood."""
    if end.exit_code == SIGKILL:
        likelihood = 0
    elif end.reason is Reason.PREEMPTED:
        likelihood = 3  # within one second of another's crash it was sent away because of it
    else:
        likelihood = 2 if end.reason is Reason.STALLED else 1
    return end.reason in _FOLLOWS, began_to_end(pod), likelihood, end.pod


def began_to_end(pod: Object) -> datetime:
    """When the pod's end began: it was told to leave, or its process ended."""
    moments = [trouble.finished_at(pod, build.CONTAINER), trouble.told_to_leave(pod)]
    return min((each for each in moments if each is not None), default=trouble.NEVER)


def alive(pods: Sequence[Object], now: datetime) -> list[Object]:
    """The pods that may still write."""
    return [pod for pod in pods if not trouble.ended(pod) and not _lost(pod, now)]


def _lost(pod: Object, now: datetime) -> bool:
    leaving = pod["metadata"].get("deletionTimestamp")
    return bool(leaving) and now > trouble.moment(leaving) + timedelta(seconds=LOST_SECONDS)


def complete(pods: Sequence[Object], nodes: int) -> bool:
    """Every pod of the gang runs, or has run."""
    return len(pods) >= nodes and all(trouble.running(pod) or trouble.ended(pod) for pod in pods)


def holds_nodes(pods: Sequence[Object]) -> bool:
    """A pod has a place on a node, and with it the accelerators that it asked for."""
    return any(pod.get("spec", {}).get("nodeName") and not trouble.ended(pod) for pod in pods)


def has_condition(gang: Object | None, kind: str) -> bool:
    """The PyTorchJob says this of itself."""
    conditions = ((gang or {}).get("status") or {}).get("conditions") or []
    return any(each.get("type") == kind and each.get("status") == "True" for each in conditions)


def queued(gang: Object | None) -> bool:
    """A queue such as Kueue holds the gang: its pods go and come back within one attempt."""
    return bool(gang and (gang["spec"].get("runPolicy") or {}).get("suspend"))


def evicted(pod: Object, gang: Object | None) -> bool:
    """The queue took the pod's place away: its leaving ends nothing, as another pod takes its place.

    What had ended before the queue held the gang had ended by itself.
    """
    if trouble.told_to_leave(pod) is None:
        return False
    if not queued(gang):
        resumed = _since(gang, "False")
        return resumed is not None and trouble.moment(pod["metadata"]["creationTimestamp"]) < resumed
    held, finished = _since(gang, "True"), trouble.finished_at(pod, build.CONTAINER)
    if held is None or finished is None:
        return trouble.left_when_told(pod, build.CONTAINER)
    return finished >= held


def _since(gang: Object | None, suspended: str) -> datetime | None:
    """Since when training-operator sees the gang held by its queue, or let run by it; None when it does not."""
    conditions = ((gang or {}).get("status") or {}).get("conditions") or []
    told = [each for each in conditions if each.get("type") == "Suspended" and each.get("status") == suspended]
    return max((trouble.moment(each["lastTransitionTime"]) for each in told), default=None)


def assembling_since(pods: Sequence[Object], attempt_start: str) -> datetime:
    """Since when the gang waits for its missing pods."""
    created = [trouble.moment(pod["metadata"]["creationTimestamp"]) for pod in pods]
    return min(created, default=trouble.moment(attempt_start))
