"""What a pod and its events tell of trouble, as a documented reason and a sentence.

Reasons and codes are compared, never texts: what the kubelet or the scheduler wrote is quoted to the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, Exit

Object = Mapping[str, Any]

NEVER = datetime.max.replace(tzinfo=UTC)
"""Later than every moment."""
CONFIRMING_SECONDS = 30.0
"""Longest time from the end of a pod that was told to leave until its kubelet confirms it, its volumes being off."""
SIGKILL = 137
SIGTERM = 143

_CODES = {
    Exit.OK: Reason.SUCCEEDED,
    Exit.CRASHED: Reason.CRASHED,
    Exit.SPEC_INVALID: Reason.SPEC_INVALID,
    Exit.DATA_INVALID: Reason.DATA_INVALID,
    Exit.MODEL_INVALID: Reason.MODEL_INVALID,
    Exit.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    Exit.ASSERTION_FAILED: Reason.ASSERTION_FAILED,
    Exit.STORAGE_FAILED: Reason.STORAGE_FAILED,
    Exit.STALLED: Reason.STALLED,
    Exit.PREEMPTED: Reason.PREEMPTED,
    Exit.CREDENTIALS: Reason.CREDENTIALS_WRONG,
    Exit.DISK_FULL: Reason.DISK_FULL,
}

_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not run."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class PodEnd:
    """How one pod ended, as far as it can be told."""

    pod: str
    reason: Reason
    exit_code: int | None
    message: str
    hint: str
    ending: Ending | None
    """What the pod itself said, if it could."""

    @property
    def succeeded(self) -> bool:
        """It said so, and ended with 0."""
        return self.exit_code == 0 and self.ending is not None and self.ending.reason is Reason.SUCCEEDED


def ended(pod: Object) -> bool:
    """The pod runs no more, and never will again."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def running(pod: Object) -> bool:
    """Every main container of the pod has started."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return bool(statuses) and all("running" in each.get("state", {}) for each in statuses)


def said(text: str | None) -> Ending | None:
    """A termination message, if it is one of ours: it is held against the contract before it is believed."""
    try:
        return Ending.read(json.loads(text or ""))
    except (ValueError, TypeError, ValidationError):
        return None


def end_of(pod: Object, container: str) -> PodEnd | None:
    """How the pod ended; None while it lives. The exit code speaks first, then the pod's reason, then a signal."""
    disruption = _condition(pod, "DisruptionTarget")
    state = _terminated(pod, container)
    if state is None and not ended(pod):
        return None
    code = state.get("exitCode") if state else None
    ending = said(state.get("message") if state else None)
    reason = _reason(pod, container, code, ending, disrupted=disruption is not None)
    message = (ending.message if ending else "") or _words(pod, state or {}, code, disruption)
    return PodEnd(
        pod=pod["metadata"]["name"],
        reason=reason,
        exit_code=code,
        message=message,
        hint=ending.hint if ending else "",
        ending=ending,
    )


def _reason(pod: Object, container: str, code: int | None, ending: Ending | None, disrupted: bool) -> Reason:
    if code in _CODES and code not in (Exit.OK, Exit.CRASHED, Exit.STALLED):
        # A table code is the launcher's; its message may name a finer reason of the same family.
        return ending.reason if ending is not None else _CODES[Exit(code)]
    if (_terminated(pod, container) or {}).get("reason") == "OOMKilled":
        return Reason.OUT_OF_MEMORY
    if disrupted or pod.get("status", {}).get("reason") in _DISRUPTED:
        return Reason.PREEMPTED
    if code == Exit.OK and ending is not None:
        return ending.reason
    if left_when_told(pod, container):
        return Reason.PREEMPTED
    if code == Exit.STALLED:
        return Reason.STALLED
    return ending.reason if ending is not None and code == Exit.CRASHED else Reason.CRASHED


_DISRUPTED = ("Evicted", "Preempting", "NodeLost", "Shutdown", "Terminated")
"""Reasons of a pod's status that say that its node wanted it gone."""


def left_when_told(pod: Object, container: str) -> bool:
    """It was told to leave before its process ended.

    A kubelet confirms an end by deleting the pod once more without grace, which moves the moment of its deletion
    behind the end of its process: what was deleted so soon after its end was told before.
    """
    told, finished = told_to_leave(pod), finished_at(pod, container)
    if told is None or finished is None or told <= finished:
        return told is not None
    without_grace = pod["metadata"].get("deletionGracePeriodSeconds") == 0
    return without_grace and (told - finished).total_seconds() <= CONFIRMING_SECONDS


def told_to_leave(pod: Object) -> datetime | None:
    """When the pod was deleted or marked for disruption; None when it was not."""
    moments = []
    if deletion := pod["metadata"].get("deletionTimestamp"):
        # The timestamp says when its grace is over.
        grace = pod["metadata"].get("deletionGracePeriodSeconds") or 0
        moments.append(moment(deletion) - timedelta(seconds=grace))
    if (disruption := _condition(pod, "DisruptionTarget")) and disruption.get("lastTransitionTime"):
        moments.append(moment(disruption["lastTransitionTime"]))
    return min(moments, default=None)


def finished_at(pod: Object, container: str) -> datetime | None:
    """When the container's process ended; None while it runs, or when nobody knows."""
    text = (_terminated(pod, container) or {}).get("finishedAt")
    return moment(text) if text else None


def _words(pod: Object, state: Object, code: int | None, disruption: Object | None) -> str:
    name = pod["metadata"]["name"]
    if disruption is not None:
        return f"pod {name} was told to leave: {disruption.get('reason')}: {disruption.get('message', '')}"
    if pod.get("status", {}).get("message"):
        return f"pod {name}: {pod['status'].get('reason', '')}: {pod['status']['message']}"
    if state.get("reason") == "OOMKilled":
        return f"pod {name} was killed because it took more memory than pod.resources.limits allows"
    if code is None:
        return f"pod {name} ended without a word"
    if code > 128:
        return f"pod {name} was ended by signal {code - 128}"
    return f"pod {name} ended with code {code} and no message; its log tells more"


def _terminated(pod: Object, container: str) -> Object | None:
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status.get("name") == container:
            found: Object | None = status.get("state", {}).get("terminated")
            return found
    return None


def _condition(pod: Object, kind: str) -> Object | None:
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition.get("type") == kind and condition.get("status") == "True":
            found: Object = condition
            return found
    return None


def of_pod(pod: Object, events: Iterable[Object]) -> Trouble | None:
    """What keeps a living pod from running, by its waiting containers, its scheduling, and its Warning events."""
    name = pod["metadata"]["name"]
    status = pod.get("status", {})
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or []:
            waiting = container.get("state", {}).get("waiting", {})
            words = f"pod {name}: {waiting.get('reason')}: {waiting.get('message', '')}"
            if waiting.get("reason") in _PULL:
                return Trouble(Reason.IMAGE_UNAVAILABLE, words)
            if waiting.get("reason") in _CONFIG:
                return Trouble(Reason.PODS_REFUSED, words)
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return Trouble(Reason.UNSCHEDULABLE, f"pod {name}: {condition.get('message', '')}")
    return _mounts(pod, events)


def _mounts(pod: Object, events: Iterable[Object]) -> Trouble | None:
    """Only events tell that a volume cannot be mounted; which one it is, the pod's own volumes tell."""
    name = pod["metadata"]["name"]
    if running(pod):
        return None
    for event in sorted(events, key=when, reverse=True):
        if event.get("reason") != "FailedMount" or event.get("involvedObject", {}).get("name") != name:
            continue
        text = event.get("message", "")
        secrets = [secret for secret in secrets_of(pod) if f'"{secret}"' in text or f"/{secret}" in text]
        if _volume(text) == names.tracker_volume("wandb"):
            return Trouble(
                Reason.CREDENTIALS_MISSING,
                "the Secret that reports.wandb.credentials names is not in this namespace, or lacks WANDB_API_KEY "
                f"(the node says: {text})",
            )
        if secrets or _volume(text).startswith("credentials-"):
            named = ", ".join(sorted(set(secrets or secrets_of(pod))))
            return Trouble(
                Reason.CREDENTIALS_MISSING,
                f"Secret {named} is not in this namespace, or lacks AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY "
                f"(the node says: {text})",
            )
        return Trouble(Reason.VOLUME_UNAVAILABLE, f"pod {name}: {text}")
    return None


def _volume(text: str) -> str:
    """The volume that the kubelet names first in quotes."""
    parts = text.split('"')
    return parts[1] if len(parts) > 2 else ""


def secrets_of(pod: Object) -> list[str]:
    """The Secrets that a pod mounts."""
    found = []
    for volume in pod.get("spec", {}).get("volumes") or []:
        for source in volume.get("projected", {}).get("sources") or []:
            if "secret" in source:
                found.append(source["secret"]["name"])
    return sorted(set(found))


def refused(events: Iterable[Object], owner: str) -> Trouble | None:
    """A controller could not make the pods of this object: its newest words."""
    for event in sorted(events, key=when, reverse=True):
        if event.get("involvedObject", {}).get("name") == owner and event.get("reason") in _REFUSALS:
            return Trouble(Reason.PODS_REFUSED, f"{owner}: {event.get('message', '')}")
    return None


_REFUSALS = {"FailedCreate", "FailedCreatePod", "FailedCreateService", "PyTorchJobFailedCreate"}


def when(event: Object) -> str:
    """When an event was last seen, RFC 3339."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp") or "")


def moment(text: str) -> datetime:
    """A moment of the API server."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
