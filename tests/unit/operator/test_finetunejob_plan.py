"""A FineTuneJob's way, as a table: what is there, what shall happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    kinds,
    leading,
    message,
    pod,
    published,
    terminated,
    text,
)
from trimtab_api.contract import Ending, ProgressReport
from trimtab_api.v1alpha1.progress import FineTuneJobStatus, Memory, Progress
from trimtab_api.v1alpha1.status import PinnedInput, Predictions
from trimtab_operator.finetunejob import status
from trimtab_operator.finetunejob.plan import hindered, plan
from trimtab_operator.plan import Plan

SOUND = Ending(
    reason=Reason.INPUTS_SOUND,
    rows=40,
    pins=[PinnedInput(field="model.from", uri="s3://bucket/base", digest="sha256:" + "b" * 64)],
)


def main(code: int, ending: Ending | None = None, seconds: float = -1, **more: Any) -> dict[str, Any]:
    return terminated("pytorch", code, ending, seconds, **more)


def said(reason: Reason, step: int | None = None) -> Ending:
    return Ending(reason=reason, message="what happened", hint="What to do.", step=step)


@dataclass(frozen=True)
class Case:
    name: str
    there: Callable[[], Story]
    state: tuple[str, str] | None
    makes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    says: str = ""


CLOSE = {"python": {"configMapKeyRef": {"name": "rewards", "key": "rewards.py"}, "function": "close"}}
CASES = [
    Case(
        "a new job has its inputs looked at",
        lambda: Story(),
        ("Unknown", "Checking"),
        makes=("Job",),
    ),
    Case(
        "a suspended job holds nothing",
        lambda: Story(spec={"suspend": True}),
        ("Unknown", "Suspended"),
    ),
    Case(
        "sound inputs write the first attempt down before anything of it is made",
        lambda: Story().checked(0, SOUND),
        ("Unknown", "Pending"),
    ),
    Case(
        "an attempt that stands in status is made, the PyTorchJob last",
        lambda: Story().begun(1),
        None,
        makes=("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "PyTorchJob"),
    ),
    Case(
        "what is over is cleared away before an attempt is said to be made",
        lambda: _begun_and_made(needless=True),
        None,
        deletes=("job-preflight",),
    ),
    Case(
        "an attempt whose PyTorchJob is there is said to be made",
        lambda: _begun_and_made(),
        ("Unknown", "Pending"),
    ),
    Case(
        "suspended before its PyTorchJob is made, an attempt ends and makes none",
        lambda: Story(spec={"suspend": True}).begun(1),
        ("Unknown", "Suspended"),
    ),
    Case(
        "past its deadline, an attempt that was not made yet is none",
        lambda: Story(spec={"activeDeadlineSeconds": 30}).begun(1),
        ("False", "DeadlineExceeded"),
    ),
    Case(
        "a mistake in the inputs is told and leaves the job waiting",
        lambda: Story().checked(Exit.DATA_INVALID, said(Reason.DATA_INVALID)),
        ("Unknown", "DataInvalid"),
        says="what happened. What to do.",
    ),
    Case(
        "a run that cannot fit waits for a change, with what would make it fit",
        lambda: Story().checked(Exit.OUT_OF_MEMORY, said(Reason.MEMORY_TOO_SMALL)),
        ("Unknown", "MemoryTooSmall"),
        says="what happened. What to do.",
    ),
    Case(
        "code of the user's waits for the installation's leave",
        lambda: Story(spec={"method": "grpo", "grpo": {"rewards": [{"name": "format"}, CLOSE]}}),
        ("Unknown", "SpecInvalid"),
        says="grpo.rewards[1].python is code that would run in the trainer's pods, and this installation does not",
    ),
    Case(
        "inputs that were wrong are looked at again after a while",
        lambda: Story().checked(Exit.DATA_INVALID, said(Reason.DATA_INVALID), ago=6),
        ("Unknown", "DataInvalid"),
        deletes=("job-preflight",),
    ),
    Case(
        "a changed spec has its inputs looked at again at once",
        lambda: Story().checked(Exit.DATA_INVALID, said(Reason.DATA_INVALID), hashed="of another spec"),
        ("Unknown", "Checking"),
        deletes=("job-preflight",),
    ),
    Case(
        "a Secret that is not there is told while the pod waits for it",
        lambda: _mounting('MountVolume.SetUp failed for volume "credentials-1": secret "keys" not found'),
        ("Unknown", "CredentialsMissing"),
        says="keys",
    ),
    Case(
        "a tracker's keys that are not there are told by its field",
        lambda: _mounting('MountVolume.SetUp failed for volume "tracker-wandb": secret "wandb" not found'),
        ("Unknown", "CredentialsMissing"),
        says="reports.wandb.credentials",
    ),
    Case(
        "a gang that runs is told so",
        lambda: Story().attempt(1).runs(RUNNING),
        ("Unknown", "Running"),
    ),
    Case(
        "a worker that is missing is waited for",
        lambda: Story(spec={"distributed": {"nodes": 2}}).attempt(1).runs(RUNNING),
        ("Unknown", "Pending"),
        says="1 of 2 pods",
    ),
    Case(
        "no room is told with the scheduler's words",
        lambda: Story().attempt(1).runs({"phase": "Pending", **_unschedulable()}),
        ("Unknown", "Unschedulable"),
        says="0/3 nodes",
    ),
    Case(
        "a gang that finds no room at all goes on waiting for a node, and holds nothing",
        lambda: Story().attempt(1, seconds=-400).runs({"phase": "Pending", **_unschedulable()}, seconds=-400),
        ("Unknown", "Unschedulable"),
    ),
    Case(
        "a gang of which only a part finds room for too long lets go of what it holds",
        lambda: (
            Story(spec={"distributed": {"nodes": 2}})
            .attempt(1, seconds=-400)
            .runs(RUNNING, {"phase": "Pending", **_unschedulable()}, seconds=-400)
        ),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
        says="0/3 nodes",
    ),
    Case(
        "a part of a gang that only just began is given time",
        lambda: (
            Story(spec={"distributed": {"nodes": 2}})
            .attempt(1, seconds=-400)
            .runs(RUNNING, {"phase": "Pending", **_unschedulable()}, seconds=-60)
        ),
        ("Unknown", "Unschedulable"),
    ),
    Case(
        "an artifact with a digest is success",
        lambda: Story().attempt(1).runs(main(0, published())),
        ("True", "Succeeded"),
    ),
    Case(
        "no digest, no success",
        lambda: Story().attempt(1).runs(main(0, Ending(reason=Reason.SUCCEEDED))),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
    ),
    Case(
        "a failure that may pass is followed by another attempt",
        lambda: Story().attempt(1).runs(main(Exit.STORAGE_FAILED, said(Reason.STORAGE_FAILED))),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
    ),
    Case(
        "while a pod of the gang lives, the attempt is not closed",
        lambda: (
            Story(spec={"distributed": {"nodes": 2}})
            .attempt(1)
            .runs(RUNNING, main(Exit.STORAGE_FAILED, said(Reason.STORAGE_FAILED)))
        ),
        ("Unknown", "Restarting"),
        says="leaving",
    ),
    Case(
        "retries that are used up end the job with the cause",
        lambda: (
            Story(spec={"retries": {"limit": 1}}, status={"failures": 1})
            .attempt(2)
            .runs(main(Exit.OUT_OF_MEMORY, said(Reason.OUT_OF_MEMORY)))
        ),
        ("False", "OutOfMemory"),
        deletes=("job-2",),
        says="retries.limit (1)",
    ),
    Case(
        "what would only happen again is not tried again",
        lambda: Story().attempt(1).runs(main(Exit.ASSERTION_FAILED, said(Reason.ASSERTION_FAILED))),
        ("False", "AssertionFailed"),
        deletes=("job-1",),
    ),
    Case(
        "a gang that has failed keeps its pods, so that their logs can be read",
        lambda: Story().attempt(1).runs(main(Exit.STALLED, said(Reason.STALLED))).failed(),
        ("Unknown", "Restarting"),
    ),
    Case(
        "a deadline that passes between two attempts ends the job",
        lambda: Story(spec={"activeDeadlineSeconds": 60}).attempt(1, -100, endTime=at(-50), reason="Stalled"),
        ("False", "DeadlineExceeded"),
    ),
    Case(
        "a preempted gang spends no retry",
        lambda: (
            Story(spec={"retries": {"limit": 0}}).attempt(1).runs(main(Exit.PREEMPTED, said(Reason.PREEMPTED, step=7)))
        ),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
    ),
    Case(
        "a gang that someone deleted comes back",
        lambda: _without_gang(),
        ("Unknown", "Restarting"),
    ),
    Case(
        "what was taken away from under a gang that runs is made again",
        lambda: _without(Story().attempt(1).runs(RUNNING), ("ConfigMap", "job-1-run"), ("Role", "job-trainer")),
        ("Unknown", "Running"),
        makes=("Role", "ConfigMap"),
    ),
    Case(
        "and so it is while the gang is not complete",
        lambda: _without(Story().attempt(1), ("ConfigMap", "job-1-run")),
        ("Unknown", "Pending"),
        makes=("ConfigMap",),
    ),
    Case(
        "suspending sends the gang away",
        lambda: Story(spec={"suspend": True}).attempt(1).runs(RUNNING),
        ("Unknown", "Suspended"),
        deletes=("job-1",),
    ),
    Case(
        "a job past its deadline sends its gang away",
        lambda: Story(spec={"activeDeadlineSeconds": 30}).attempt(1).runs(RUNNING),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
        says="activeDeadlineSeconds (30 s)",
    ),
    Case(
        "silence beyond the limit is a hang",
        lambda: (
            Story(spec={"hangTimeoutSeconds": 60})
            .attempt(1, seconds=-900)
            .runs({"phase": "Running", **container("pytorch", running={"startedAt": at(-800)})})
        ),
        ("Unknown", "Restarting"),
        deletes=("job-1",),
        says="no step was reported",
    ),
    Case(
        "a finished job past its time is deleted",
        lambda: Story(spec={"ttlSecondsAfterFinished": 10}, status=_finished(-20)),
        None,
        deletes=("job",),
    ),
    Case(
        "a finished job within its time is kept",
        lambda: Story(spec={"ttlSecondsAfterFinished": 30}, status=_finished(-20)),
        None,
    ),
]


def _mounting(words: str) -> Story:
    story = Story().checking()
    story.preflight_pods = [pod("preflight", "job-preflight-x", phase="Pending")]
    story.events = [
        {
            "reason": "FailedMount",
            "message": words,
            "involvedObject": {"name": "job-preflight-x"},
            "lastTimestamp": at(-1),
        }
    ]
    return story


def _unschedulable() -> dict[str, Any]:
    told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no gpu"}
    return {"conditions": [told]}


def _begun_and_made(needless: bool = False) -> Story:
    """The PyTorchJob was made, and the operator killed before it said so."""
    story = Story().attempt(1)
    del story.status["attempts"][0]["uid"]
    if needless:
        story.needless = [{"kind": "Job", "metadata": {"name": "job-preflight", "namespace": "ns", "uid": "p1"}}]
    return story


def _without(story: Story, *missing: tuple[str, str]) -> Story:
    story.missing |= set(missing)
    return story


def _without_gang() -> Story:
    story = Story().attempt(1)
    story.gang = None
    return story


def _finished(seconds: float) -> dict[str, Any]:
    return {"completionTime": at(seconds), "conditions": []}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plan(case: Case) -> None:
    decided = plan(case.there().seen(), NOW)
    if case.state is None:
        assert decided.status is None
    else:
        assert leading(decided) == case.state
    assert tuple(kinds(decided)) == case.makes
    assert {ref.name for ref in decided.delete} >= set(case.deletes)
    if not case.deletes:
        assert decided.delete == ()
    if case.says:
        assert case.says in message(decided)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_status_is_one_that_the_models_read(case: Case) -> None:
    decided = plan(case.there().seen(), NOW)
    if decided.status is not None:
        assert FineTuneJobStatus.model_validate(decided.status).dump() == decided.status


def attempts(decided: Plan) -> list[dict[str, Any]]:
    assert decided.status is not None
    found: list[dict[str, Any]] = decided.status["attempts"]
    return found


def test_the_earliest_end_is_the_cause() -> None:
    story = Story(spec={"distributed": {"nodes": 2}}).attempt(1)
    late = main(Exit.STALLED, said(Reason.STALLED), seconds=-1)
    story.runs(late, main(137, seconds=-9, reason="OOMKilled"))
    decided = plan(story.seen(), NOW)
    assert attempts(decided)[0]["reason"] == "OutOfMemory"
    assert decided.status is not None
    assert decided.status["failures"] == 1


@pytest.mark.parametrize(("moved", "reason"), [(None, "Preempted"), (1, "Preempted"), (120, "Crashed")])
def test_a_pod_that_was_told_to_leave_is_preempted_though_its_kubelet_deletes_it_again(
    moved: float | None, reason: str
) -> None:
    """The second deletion is without grace, and its moment lies behind the end of the process. What ended long before
    anybody deleted it had crashed."""
    story = Story().attempt(1, -600).runs(main(137, seconds=-200))
    grace = {"deletionTimestamp": at(-200), "deletionGracePeriodSeconds": 300}
    again = {"deletionTimestamp": at(-200 + (moved or 0)), "deletionGracePeriodSeconds": 0}
    story.pods[0]["metadata"] |= grace if moved is None else again
    assert attempts(plan(story.seen(), NOW))[0]["reason"] == reason


def test_an_ended_attempt_lets_its_evidence_go_only_with_the_status_that_tells_of_it() -> None:
    story = Story().attempt(1).runs(main(Exit.STORAGE_FAILED, said(Reason.STORAGE_FAILED)))
    decided = plan(story.seen(), NOW)
    assert [each["metadata"]["name"] for each in decided.release] == ["job-1-master-0"]
    assert attempts(decided)[0]["endTime"] == at(0)
    open_still = plan(Story().attempt(1).runs(RUNNING).seen(), NOW)
    assert open_still.release == ()


def test_a_restart_of_the_plan_makes_the_same_attempt() -> None:
    """Killed between any of the objects and the status that tells of them, the operator makes the same again."""
    first, second = (plan(Story().begun(1).seen(), NOW) for _ in range(2))
    assert (first.apply, first.create) == (second.apply, second.create)
    assert [made["metadata"]["name"] for made in first.apply] == ["job-1-run"]
    assert first.create[-1]["metadata"]["name"] == "job-1"
    made = plan(_begun_and_made().seen(), NOW)
    assert attempts(made)[0]["uid"] == "g1"
    assert [event.reason for event in made.events] == ["Started"]


def test_the_estimate_of_memory_is_told_when_the_first_attempt_starts_and_stays() -> None:
    memory = Memory(
        parameters=7, trainable_parameters=2, weights_bytes=5, gradients_bytes=4, optimizer_bytes=3,
        activations_bytes=2, overhead_bytes=1,
    )  # fmt: skip
    first = plan(Story().checked(0, SOUND.model_copy(update={"memory": memory})).seen(), NOW)
    assert first.status is not None
    assert first.status["memory"]["weightsBytes"] == 5
    again = Story(status={**first.status, "preemptions": 1})
    again.status["attempts"] = [{"number": 1, "startTime": at(-60), "endTime": at(-5), "reason": "Preempted"}]
    second = plan(again.seen(), NOW)
    assert second.status is not None
    assert second.status["memory"] == first.status["memory"]


@pytest.mark.parametrize(("reached", "shown"), [(None, "50/50"), (50, "50/50"), (20, "20/50")])
def test_a_run_that_ended_early_shows_its_step(reached: int | None, shown: str) -> None:
    done = status.complete(Progress(step=18, total_steps=50, steps="18/50"), reached)
    assert done is not None
    assert (done.steps, done.eta) == (shown, "")


def test_image_and_inputs_are_pinned_before_anything_is_made_from_them() -> None:
    first = plan(Story().checked(0, SOUND).seen(), NOW)
    assert first.status is not None
    assert first.status["startTime"] == at(0), "from now on the API server refuses another spec"
    assert first.status["resolved"]["inputs"][0]["digest"] == "sha256:" + "b" * 64
    begun = Story(status={**first.status, "resolved": {**first.status["resolved"], "image": "registry/old"}})
    made = plan(begun.seen(), NOW)
    assert "registry/old" in text(made.create[-1])
    assert "sha256:" + "b" * 64 in text(made.apply)


def test_later_attempts_take_the_image_and_inputs_of_the_first() -> None:
    first = plan(Story().checked(0, SOUND).seen(), NOW)
    assert first.status is not None
    ended = {"number": 1, "uid": "g1", "startTime": at(-60), "endTime": at(-5), "reason": "Preempted"}
    resolved = {**first.status["resolved"], "image": "registry/old"}
    again = plan(Story(status={**first.status, "attempts": [ended], "resolved": resolved}).seen(), NOW)
    assert again.status is not None
    assert (again.status["attempt"], again.status["resolved"]) == (2, resolved)


def test_an_attempt_that_cannot_be_made_is_taken_back_so_that_spec_can_be_mended() -> None:
    first = plan(Story().checked(0, SOUND).seen(), NOW)
    assert first.status is not None
    refused = hindered(Story(status=dict(first.status)).seen(), NOW, "PodsRefused", "no quota")
    assert FineTuneJobStatus.model_validate(refused).dump() == refused
    assert (refused["attempt"], refused.get("startTime"), refused.get("resolved")) == (0, None, None)
    story = Story(status=refused).checked(0, SOUND)
    waits = plan(story.seen(), NOW)
    assert (waits.status, waits.requeue_after) == (None, 15.0)
    again = plan(story.seen(), NOW + timedelta(seconds=16))
    assert [each["number"] for each in attempts(again)] == [1]
    story.status["observedGeneration"] = 2
    assert [each["number"] for each in attempts(plan(story.seen(), NOW))] == [1], "a changed spec is tried at once"


def test_a_later_attempt_that_cannot_be_made_keeps_the_start_and_its_number() -> None:
    story = Story().attempt(1, endTime=at(-90), reason="Preempted").begun(2)
    story.status["resolved"] = plan(Story().checked(0, SOUND).seen(), NOW).status["resolved"]  # type: ignore[index]
    refused = hindered(replace(story.seen(), gang=None), NOW, "NameConflict", "taken")
    assert refused["startTime"] == at(-60)
    assert [(each["number"], each["reason"]) for each in refused["attempts"]] == [(1, "Preempted"), (2, "NameConflict")]
    again = plan(Story(status=refused).seen(), NOW + timedelta(seconds=16))
    assert [each["number"] for each in attempts(again)] == [1, 2]


def test_an_attempt_that_was_made_is_not_taken_back() -> None:
    told = hindered(_begun_and_made().seen(), NOW, "PodsRefused", "no ConfigMap")
    assert told["attempt"] == 1
    assert "endTime" not in told["attempts"][0]


def test_failures_wait_longer_each_time_and_preemptions_do_not_wait() -> None:
    def ended(reason: str, failures: int) -> Plan:
        story = Story(status={"failures": failures})
        story.attempt(1, endTime=at(-1), reason=reason)
        return plan(story.seen(), NOW)

    once, twice = ended("StorageFailed", 1), ended("StorageFailed", 2)
    assert once.requeue_after is not None
    assert twice.requeue_after is not None
    assert 0 < once.requeue_after < twice.requeue_after
    assert [each["number"] for each in attempts(ended("Preempted", 0))] == [1, 2]


def test_a_report_of_an_earlier_attempt_is_not_believed() -> None:
    story = Story(status={"progress": {"step": 5, "totalSteps": 9}}).attempt(2).runs(RUNNING)
    old = ProgressReport(attempt=1, progress=Progress(step=8, total_steps=9))
    seen = story.seen()
    told = plan(type(seen)(**{**seen.__dict__, "report": old}), NOW)
    assert told.status is not None
    assert told.status["progress"]["step"] == 5


def test_deletion_lets_every_pod_go_and_makes_nothing() -> None:
    story = Story(deleted=True).attempt(1)
    seen = story.seen()
    left = (pod("trainer", "job-1-master-0", 1),)
    decided = plan(type(seen)(**{**seen.__dict__, "leavings": left}), NOW)
    assert decided.release == left
    assert decided.create == ()
    assert decided.status is None


def test_the_place_of_the_answers_stands_beside_the_artifact() -> None:
    answered = Predictions(uri="s3://bucket/runs/ns/job/u1/predictions/000000009", digest="sha256:" + "c" * 64, rows=3)
    ended = published().model_copy(update={"predictions": answered})
    decided = plan(Story().attempt(1).runs(main(0, ended)).seen(), NOW)
    assert decided.status is not None
    assert decided.status["predictions"] == answered.dump()
    assert decided.status["artifact"]["digest"]
