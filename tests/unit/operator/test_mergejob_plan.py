"""A MergeJob's way, as a table: what is there, what shall happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.unit.operator.makers import DIGEST, NOW, SETTINGS, at, kinds, leading, message
from tests.unit.operator.merge_makers import OTHER_DIGEST, PREFIX, RUNNING, Story, published, said, trained
from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, MergeConfig
from trimtab_operator.mergejob.plan import configure, plan
from trimtab_operator.plan import Plan
from trimtab_operator.sources import Reference, Unmet

BEFORE_THE_JOB = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "ConfigMap")


def pushed_out() -> dict[str, Any]:
    return {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "Pod was evicted"}


def over(story: Story, condition: dict[str, Any]) -> Story:
    story.work["status"] = {"conditions": [condition]}
    return story


def failed(story: Story, times: int) -> Story:
    story.status["failures"] = times
    return story


def wrong(reason: str, since: float) -> dict[str, Any]:
    return {
        "type": "InputsSound", "status": "False", "reason": reason, "message": "m", "lastTransitionTime": at(since)
    }  # fmt: skip


def after_recheck(ended: float, since: float) -> Story:
    """Inputs were found wanting so long ago; the Job is gone."""
    story = Story().begun()
    del story.children["Job", "merged-merge"]
    story.status["attempts"] = [
        {"number": 1, "startTime": at(ended - 9), "endTime": at(ended), "reason": "BucketMissing"}
    ]
    story.status["conditions"] = [wrong("BucketMissing", since)]
    return story


@dataclass(frozen=True)
class Case:
    name: str
    there: Callable[[], Story]
    state: tuple[str, str] | None
    makes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    says: str = ""


CASES = [
    Case(
        "it waits for an adapter that is not there",
        lambda: Story(producers={Reference("FineTuneJob", "harbour"): None}),
        ("Unknown", "Waiting"),
        says="FineTuneJob harbour, which does not exist",
    ),
    Case(
        "it waits for an adapter that is being trained",
        lambda: Story(producers=dict([trained("harbour", digest=None)])),
        ("Unknown", "Waiting"),
        says="waits for FineTuneJob harbour (Running)",
    ),
    Case(
        "a whole model is no adapter",
        lambda: Story(producers=dict([trained("harbour", kind="model")])),
        ("Unknown", "ModelInvalid"),
        says="Name a FineTuneJob with tuner.type lora",
    ),
    Case(
        "adapters of two bases are not merged",
        lambda: Story(
            spec={"adapters": [{"from": {"fineTuneJob": {"name": each}}} for each in ("harbour", "swift")]},
            producers=dict([trained("harbour"), trained("swift", base="sha256:" + "c" * 64)]),
        ),
        ("Unknown", "BaseMismatch"),
        says=OTHER_DIGEST,
    ),
    Case(
        "without a place for results it says where to name one",
        lambda: Story(settings=SETTINGS.model_copy(update={"output": None})),
        ("Unknown", "OutputMissing"),
        says="spec.output.uri",
    ),
    Case(
        "with everything there it makes the Job, last",
        Story,
        ("Unknown", "Pending"),
        makes=(*BEFORE_THE_JOB, "Job"),
    ),
    Case(
        "the user's own ServiceAccount is taken and none is made",
        lambda: Story(spec={"pod": {"serviceAccountName": "mine"}}),
        ("Unknown", "Pending"),
        makes=(*BEFORE_THE_JOB[1:], "Job"),
    ),
    Case("a suspended job makes nothing", lambda: Story(spec={"suspend": True}), ("Unknown", "Suspended")),
    Case(
        "suspending a running job stops its pod",
        lambda: Story(spec={"suspend": True}).begun().pod(**RUNNING),
        ("Unknown", "Suspended"),
        deletes=("Job",),
    ),
    Case("a pod that starts", lambda: Story().begun().pod(phase="Pending"), ("Unknown", "Pending")),
    Case("a pod that runs", lambda: Story().begun().pod(**RUNNING), ("Unknown", "Running"), says="opens its inputs"),
    Case(
        "progress is told",
        lambda: Story().begun().pod(**RUNNING).reported(3, 14),
        ("Unknown", "Running"),
        says="3/14 shards",
    ),
    Case(
        "an image that cannot be pulled",
        lambda: (
            Story()
            .begun()
            .pod(
                phase="Pending",
                containerStatuses=[
                    {"name": "merge", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}
                ],
            )
        ),
        ("Unknown", "ImageUnavailable"),
    ),
    Case(
        "no node has room",
        lambda: (
            Story()
            .begun()
            .pod(
                phase="Pending",
                conditions=[
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
                ],
            )
        ),
        ("Unknown", "Unschedulable"),
        says="0/1 nodes",
    ),
    Case(
        "success with a digest",
        lambda: Story().begun().ended(0, published()),
        ("True", "Succeeded"),
        says=f"{PREFIX}/artifact",
    ),
    Case(
        "no digest, no success: another attempt",
        lambda: Story().begun().ended(0, said(Reason.SUCCEEDED)),
        ("Unknown", "Restarting"),
        deletes=("Job",),
    ),
    Case(
        "an artifact elsewhere is not believed",
        lambda: Story().begun().ended(0, published("s3://bucket/runs/ns/other/u9/artifact")),
        ("Unknown", "Restarting"),
        deletes=("Job",),
    ),
    Case(
        "an adapter is no merged model",
        lambda: Story().begun().ended(0, published(kind="adapter")),
        ("Unknown", "Restarting"),
        deletes=("Job",),
    ),
    Case(
        "a missing bucket is waited for",
        lambda: Story().begun().ended(Exit.STORAGE_FAILED, said(Reason.BUCKET_MISSING)),
        ("Unknown", "BucketMissing"),
        deletes=("Job",),
        says="what happened. What to do.",
    ),
    Case(
        "wrong credentials are waited for",
        lambda: Story().begun().ended(Exit.CREDENTIALS, said(Reason.CREDENTIALS_WRONG)),
        ("Unknown", "CredentialsWrong"),
        deletes=("Job",),
    ),
    Case(
        "wrong credentials are waited for even when every retry is spent",
        lambda: failed(Story().begun(), 3).ended(Exit.CREDENTIALS, said(Reason.CREDENTIALS_WRONG)),
        ("Unknown", "CredentialsWrong"),
        deletes=("Job",),
    ),
    Case(
        "a crash is tried again",
        lambda: failed(Story().begun(), 2).ended(Exit.CRASHED, said(Reason.CRASHED)),
        ("Unknown", "Restarting"),
        deletes=("Job",),
    ),
    Case(
        "a crash too many ends it",
        lambda: failed(Story().begun(), 3).ended(Exit.CRASHED, said(Reason.CRASHED)),
        ("False", "Crashed"),
    ),
    Case(
        "logits that differ end it at once",
        lambda: Story().begun().ended(Exit.ASSERTION_FAILED, said(Reason.ASSERTION_FAILED)),
        ("False", "AssertionFailed"),
    ),
    Case(
        "a drained node costs no retry",
        lambda: over(failed(Story(spec={"retries": 0}).begun(), 0), pushed_out()),
        ("Unknown", "Restarting"),
        deletes=("Job",),
        says="told to leave",
    ),
    Case(
        "a pod deleted by hand costs no retry",
        lambda: over(
            Story(spec={"retries": 0}).begun(), {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
        ),
        ("Unknown", "Restarting"),
        deletes=("Job",),
        says="deleted before its ending could be read",
    ),
    Case(
        "the deadline ends a running job",
        lambda: Story(spec={"activeDeadlineSeconds": 30}).begun(startTime=at(-31)).pod(**RUNNING),
        ("False", "DeadlineExceeded"),
        deletes=("Job",),
    ),
    Case(
        "another spec before the start takes the Job away",
        lambda: changed_spec(Story().begun().pod(**RUNNING)),
        None,
        deletes=("Job",),
    ),
    Case(
        "a Role that was taken away comes back",
        lambda: without(Story().begun().pod(**RUNNING), "Role", "merged-merge"),
        ("Unknown", "Running"),
        makes=("Role",),
    ),
    Case(
        "inputs that were wrong are not looked at again at once",
        lambda: after_recheck(ended=-5, since=-5),
        None,
    ),
    Case(
        "they are looked at again after a while, and what was wrong stays said",
        lambda: after_recheck(ended=-16, since=-16),
        ("Unknown", "BucketMissing"),
        makes=("Job",),
    ),
    Case("what was wrong for long is looked at seldom", lambda: after_recheck(ended=-16, since=-200), None),
]


def changed_spec(story: Story) -> Story:
    story.spec = {"dtype": "float32"}
    return story


def without(story: Story, kind: str, name: str) -> Story:
    del story.children[kind, name]
    return story


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_plan(case: Case) -> None:
    decided = plan(case.there().seen(), NOW)
    if case.state is None:
        assert decided.status is None
    else:
        assert leading(decided) == case.state
    assert tuple(kinds(decided)) == case.makes
    assert tuple(ref.kind for ref in decided.delete) == case.deletes
    assert all(ref.foreground for ref in decided.delete), "two pods could write at once"
    if case.says:
        assert case.says in message(decided)


def status(decided: Plan) -> dict[str, Any]:
    assert decided.status is not None
    return dict(decided.status)


def test_an_ending_is_counted_once() -> None:
    story = Story().begun().ended(Exit.CRASHED, said(Reason.CRASHED))
    first = plan(story.seen(), NOW)
    assert status(first)["failures"] == 1
    story.status = status(first)
    again = plan(story.seen(), NOW)
    assert again.status is None
    assert [ref.kind for ref in again.delete] == ["Job"]


def test_a_failure_gets_a_new_number_after_a_pause_that_doubles() -> None:
    story = failed(Story().begun(), 1).ended(Exit.CRASHED, said(Reason.CRASHED))
    story.status = status(plan(story.seen(), NOW))
    story = without(story, "Job", "merged-merge")
    assert plan(story.seen(), NOW).requeue_after == 20
    story.status["attempts"][-1]["endTime"] = at(-21)
    begun = plan(story.seen(), NOW)
    assert status(begun)["attempt"] == 2
    assert begun.create[-1]["metadata"]["labels"][names.ATTEMPT] == "2"


def test_looking_again_at_inputs_is_no_new_attempt() -> None:
    assert status(plan(after_recheck(-16, -16).seen(), NOW))["attempt"] == 1


def test_a_started_merge_keeps_its_inputs_and_its_image() -> None:
    story = Story().begun(startTime=at(-60))
    story = without(story, "Job", "merged-merge")
    story.producers = {Reference("FineTuneJob", "harbour"): None}
    story.settings = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "newer"})})
    made = plan(story.seen(), NOW).create[-1]
    assert made["kind"] == "Job"
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == SETTINGS.images.trainer


def test_an_upgrade_of_the_operator_leaves_a_job_that_has_not_started_alone() -> None:
    story = Story().begun().pod(**RUNNING)
    story.settings = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "newer"})})
    assert plan(story.seen(), NOW).delete == ()


def test_an_image_that_nobody_has_is_replaced_when_the_installation_names_another() -> None:
    waiting = {"name": "merge", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}
    story = Story().begun().pod(phase="Pending", containerStatuses=[waiting])
    story.settings = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"trainer": "newer"})})
    assert [ref.kind for ref in plan(story.seen(), NOW).delete] == ["Job"]


def test_the_start_is_when_a_pod_got_past_its_inputs() -> None:
    story = Story().begun().pod(**RUNNING)
    assert "startTime" not in status(plan(story.seen(), NOW))
    assert status(plan(story.reported(0, 14).seen(), NOW))["startTime"] == at(-60)


def test_progress_without_a_time_is_taken() -> None:
    story = Story().begun().pod(**RUNNING)
    told = {"attempt": 0, "merge": {"shard": 1, "totalShards": 1, "shards": "1/1"}}
    story.children["ConfigMap", "merged-merge-report"]["data"] = {"progress.json": json.dumps(told)}
    decided = status(plan(story.seen(), NOW))
    assert decided["progress"]["shards"] == "1/1"
    assert decided["startTime"] == at(-60)


def test_what_an_earlier_pod_reported_is_emptied_before_the_next_one() -> None:
    story = failed(Story().begun(), 1).reported(3, 14)
    story = without(story, "Job", "merged-merge")
    decided = plan(story.seen(), NOW)
    assert kinds(decided) == ["Job"]
    assert [(ref.name, patch) for ref, patch in decided.patch] == [("merged-merge-report", {"data": None})]


def test_progress_of_an_earlier_pod_is_passed_over() -> None:
    decided = status(plan(Story().begun().pod(**RUNNING).reported(3, 14, seconds=-300).seen(), NOW))
    assert "progress" not in decided


def test_other_inputs_are_written_before_their_job_is_made() -> None:
    story = changed_spec(after_recheck(ended=-1, since=-1))
    first = plan(story.seen(), NOW)
    assert [made["kind"] for made in first.apply] == ["ConfigMap"]
    assert first.create == ()
    assert first.requeue_after == 0
    assert leading(first) == ("Unknown", "Pending")


def test_what_a_finished_job_made_stays_until_its_time_is_over() -> None:
    story = Story(spec={"ttlSecondsAfterFinished": 60}).begun().ended(0, published())
    story.status = status(plan(story.seen(), NOW))
    assert plan(story.seen(), NOW).requeue_after == 60
    assert plan(story.seen(), NOW).delete == ()
    story.status["completionTime"] = at(-60)
    assert [(ref.kind, ref.uid) for ref in plan(story.seen(), NOW).delete] == [("MergeJob", "m1")]


def test_nothing_is_done_to_what_is_being_deleted() -> None:
    assert plan(Story(metadata={"deletionTimestamp": at(-1)}).seen(), NOW) == Plan()


def test_somebody_elses_job_is_not_taken_for_ours() -> None:
    story = Story().begun()
    story.work["metadata"]["ownerReferences"] = []
    assert "Job" in kinds(plan(story.seen(), NOW)), "creating it is what finds the conflict"


def test_the_base_is_the_one_that_the_adapter_was_trained_on() -> None:
    config = configure(Story().seen())
    assert isinstance(config, MergeConfig)
    assert config.base is not None
    assert config.base.s3 is not None
    assert config.base.s3.digest == OTHER_DIGEST
    assert config.base.s3.connection.endpoint == "http://s3:9000"
    assert config.adapters[0].source.s3 is not None
    assert config.adapters[0].source.s3.digest == DIGEST
    assert config.output.s3 is not None
    assert config.output.s3.uri == PREFIX


def test_the_base_is_reached_as_its_own_job_reached_it() -> None:
    storage = {"endpoint": "http://elsewhere:9000", "credentials": {"secretName": "other"}}
    producers = dict([trained("harbour"), trained("base", kind="model", output={"storage": storage})])
    config = configure(Story(producers=producers).seen())
    assert isinstance(config, MergeConfig)
    assert config.base is not None
    assert config.base.s3 is not None
    assert config.base.s3.connection.endpoint == "http://elsewhere:9000"
    made = plan(Story(producers=producers).seen(), NOW).create[-1]
    secrets = [
        source["secret"]["name"]
        for volume in made["spec"]["template"]["spec"]["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "secret" in source
    ]
    assert set(secrets) == {"keys", "other"}


def test_a_base_that_is_named_wins() -> None:
    spec = {"base": {"s3": {"uri": "s3://models/llama"}}}
    config = configure(Story(spec=spec).seen())
    assert isinstance(config, MergeConfig)
    assert config.base is not None
    assert config.base.s3 is not None
    assert config.base.s3.uri == "s3://models/llama"


def test_a_failed_reference_is_told_with_its_reason() -> None:
    reference, job = trained("harbour", digest=None)
    assert job.status is not None
    ended = job.status.conditions[0].model_copy(update={"status": "False", "reason": "DataInvalid", "message": "row 3"})
    job = job.model_copy(update={"status": job.status.model_copy(update={"conditions": [ended]})})
    found = configure(Story(producers={reference: job}).seen())
    assert isinstance(found, Unmet)
    assert found.reason is Reason.REFERENCE_FAILED
    assert "DataInvalid: row 3" in found.message


def test_a_base_is_quantised_as_it_is_with_rows_that_the_pod_can_open() -> None:
    spec = {
        "adapters": [],
        "base": {"s3": {"uri": "s3://models/llama"}},
        "quantize": {"scheme": "gptq", "calibration": {"from": {"s3": {"uri": "s3://models/rows.jsonl"}}}},
        "storage": {"credentials": {"secretName": "mine"}},
    }
    found = configure(Story(spec=spec).seen())
    assert isinstance(found, MergeConfig)
    assert found.adapters == []
    assert found.calibration is not None
    assert found.calibration.field == "quantize.calibration"
    assert found.calibration.s3 is not None
    assert found.calibration.s3.uri == "s3://models/rows.jsonl"
    assert found.calibration.s3.connection.credentials_dir == "/var/run/trimtab/credentials/mine"
