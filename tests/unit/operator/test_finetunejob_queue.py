"""A queue such as Kueue suspends a PyTorchJob and lets it run again: all within one attempt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.unit.operator.makers import (
    NOW,
    RUNNING,
    Exit,
    Reason,
    Story,
    at,
    container,
    leading,
    message,
    published,
    terminated,
)
from trimtab_api.contract import Ending, ProgressReport
from trimtab_api.v1alpha1.progress import Progress
from trimtab_operator.finetunejob.plan import plan
from trimtab_operator.plan import Plan

SAVED = Ending(reason=Reason.PREEMPTED, message="step 7 is saved", step=7)


def held(story: Story, seconds: float | None = None) -> Story:
    """The queue holds the gang; training-operator saw it so many seconds ago, or has not yet."""
    assert story.gang is not None
    told = {"type": "Suspended", "status": "True", "lastTransitionTime": at(seconds or 0)}
    conditions = [] if seconds is None else [told]
    story.gang |= {"spec": {"runPolicy": {"suspend": True}}, "status": {"conditions": conditions}}
    return story


def resumed(story: Story, seconds: float) -> Story:
    """The queue let the gang run again so many seconds ago."""
    assert story.gang is not None
    told = {"type": "Suspended", "status": "False", "lastTransitionTime": at(seconds)}
    story.gang |= {"spec": {"runPolicy": {"suspend": False}}, "status": {"conditions": [told]}}
    return story


def leaving(pod: dict[str, Any], told: float = -10) -> dict[str, Any]:
    """The pod was deleted so many seconds ago, with its grace period."""
    pod["metadata"] |= {"deletionTimestamp": at(told + 300), "deletionGracePeriodSeconds": 300}
    return pod


def confirmed(pod: dict[str, Any], seconds: float = -1) -> dict[str, Any]:
    """Its kubelet has seen its end, and deleted it once more without grace: that moves the moment of its deletion."""
    pod["metadata"] |= {"deletionTimestamp": at(seconds), "deletionGracePeriodSeconds": 0}
    return pod


def attempt(decided: Plan) -> dict[str, Any]:
    assert decided.status is not None
    found: dict[str, Any] = decided.status["attempts"][-1]
    return found


def released(decided: Plan) -> list[str]:
    return [each["metadata"]["name"] for each in decided.release]


def test_a_gang_that_waits_for_its_quota_is_queued_however_long() -> None:
    story = held(Story(spec={"activeDeadlineSeconds": 60}).attempt(1, seconds=-10))
    first = plan(story.seen(), NOW)
    assert leading(first) == ("Unknown", "Queued")
    assert "held by" in message(first)
    assert first.delete == ()
    story.status = dict(first.status or {})
    later = plan(story.seen(), NOW + timedelta(hours=5))
    assert leading(later) == ("Unknown", "Queued"), "its time counts against no deadline"


def test_time_in_the_queue_is_left_out_of_the_deadline() -> None:
    story = held(Story(spec={"activeDeadlineSeconds": 600}).attempt(1, seconds=-10))
    story.status = dict(plan(story.seen(), NOW).status or {})
    up = {"phase": "Running", **container("pytorch", running={"startedAt": at(3602)})}
    running = resumed(story, 3600).runs(up, seconds=3601)
    after = plan(running.seen(), NOW + timedelta(seconds=3610))
    assert leading(after) == ("Unknown", "Running")
    assert after.status is not None
    assert after.status["suspendedSeconds"] == 3610
    suspended = next(each for each in after.status["conditions"] if each["type"] == "Suspended")
    assert suspended["status"] == "False"
    story.status = dict(after.status)
    over = plan(story.seen(), NOW + timedelta(seconds=3610 + 595))
    assert "activeDeadlineSeconds" in message(over)


def test_pods_that_the_queue_sends_away_end_nothing_and_are_waited_for() -> None:
    story = held(Story(spec={"distributed": {"nodes": 2}}).attempt(1).runs(RUNNING, RUNNING))
    for pod in story.pods:
        leaving(pod)
    decided = plan(story.seen(), NOW)
    assert leading(decided) == ("Unknown", "Queued")
    assert (released(decided), decided.delete) == ([], ())


@pytest.mark.parametrize("seen", [-10, None], ids=["training-operator has seen it", "it has not yet"])
@pytest.mark.parametrize("mark", [leaving, confirmed])
def test_their_evidence_is_let_go_and_their_last_step_is_kept(mark: Callable[..., Any], seen: float | None) -> None:
    story = held(Story(spec={"retries": {"limit": 0, "preemptions": 0}}).attempt(1), seen)
    story.runs(terminated("pytorch", Exit.PREEMPTED, SAVED, -3))
    mark(story.pods[0])
    decided = plan(story.seen(), NOW)
    assert leading(decided) == ("Unknown", "Queued")
    assert released(decided) == ["job-1-master-0"]
    assert attempt(decided)["toStep"] == 7
    assert "endTime" not in attempt(decided)
    assert decided.status is not None
    assert (decided.status["failures"], decided.status["preemptions"]) == (0, 0)


def test_a_late_end_of_an_earlier_admission_ends_nothing() -> None:
    story = Story().attempt(1).runs(terminated("pytorch", Exit.PREEMPTED, SAVED), seconds=-60)
    resumed(leaving_first(story), -20).runs(RUNNING, seconds=-20)
    decided = plan(story.seen(), NOW)
    assert leading(decided) == ("Unknown", "Running")
    assert released(decided) == ["job-1-master-0"]
    story.status, story.pods = dict(decided.status or {}), story.pods[1:]
    old = ProgressReport(attempt=1, progress=Progress(step=5, total_steps=9))
    assert attempt(plan(replace(story.seen(), report=old), NOW))["toStep"] == 7, "5 is what the pod before reported"


def leaving_first(story: Story) -> Story:
    leaving(story.pods[0], -30)
    return story


def test_a_drained_pod_of_this_admission_ends_the_attempt() -> None:
    story = resumed(Story().attempt(1).runs(terminated("pytorch", Exit.PREEMPTED, SAVED), seconds=-15), -20)
    leaving(story.pods[0])
    decided = plan(story.seen(), NOW)
    assert leading(decided) == ("Unknown", "Restarting")
    assert decided.status is not None
    assert decided.status["preemptions"] == 1


@pytest.mark.parametrize("seen", [-10, None], ids=["training-operator has seen it", "it has not yet"])
def test_what_failed_before_the_queue_took_its_place_is_a_failure(seen: float | None) -> None:
    failed = terminated("pytorch", Exit.OUT_OF_MEMORY, Ending(reason=Reason.OUT_OF_MEMORY, message="too big"), -50)
    story = held(Story().attempt(1).runs(failed), seen)
    confirmed(story.pods[0], -10)
    assert attempt(plan(story.seen(), NOW))["reason"] == "OutOfMemory"


def test_a_gang_that_runs_again_while_its_pods_leave_fails_and_is_made_anew() -> None:
    """training-operator takes a pod that leaves for one that failed."""
    story = resumed(Story(spec={"retries": {"limit": 0}}).attempt(1).runs(RUNNING), -5)
    leaving(story.pods[0])
    assert story.gang is not None
    story.gang["status"]["conditions"].append({"type": "Failed", "status": "True"})
    decided = plan(story.seen(), NOW)
    assert leading(decided) == ("Unknown", "Restarting")
    assert "while pods were leaving" in message(decided)
    assert attempt(decided)["reason"] == "Preempted"


def test_what_published_on_its_way_out_has_succeeded() -> None:
    story = held(Story().attempt(1).runs(terminated("pytorch", 0, published(), -5)))
    leaving(story.pods[0], -10)
    assert leading(plan(story.seen(), NOW)) == ("True", "Succeeded")
