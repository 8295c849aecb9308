"""A survey tells which resources rest, and never speaks of what it does not hold."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.operator.cluster import Cluster
from tests.unit.operator.makers import NOW, SETTINGS, Story, at, pod
from trimtab_api import names
from trimtab_operator import finetunejob
from trimtab_operator.finetunejob.plan import plan
from trimtab_operator.plan import Key, Object
from trimtab_operator.reconcile import Rest, rests
from trimtab_operator.survey import NotHeld, Survey

KEY = Key("FineTuneJob", "ns", "job")


def document(story: Story) -> Object:
    """The story's job as a list tells it, with what the server adds."""
    found = story.job().dump()
    found["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    return {"kind": "FineTuneJob", **found}


def kept(pod_of: int = 1, **meta: Any) -> Object:
    made = pod("trainer", "job-1-master-0", pod_of)
    labels = made["metadata"]["labels"] | dict([names.CHILDREN.split("=")])
    return {"kind": "Pod", "metadata": {**made["metadata"], "labels": labels, **meta}}


def survey(*objects: Object) -> Survey:
    return asyncio.run(Survey.take(Cluster(*objects), []))


def found(taken: Survey, key: Key = KEY) -> Rest | None:
    return asyncio.run(rests(finetunejob.kind(SETTINGS), key, taken))


def ended(reason: str, completed: float | None = -20.0, **spec: Any) -> Story:
    """A job that has ended so many seconds ago."""
    story = Story(spec=spec).attempt(1, endTime=at(-20), reason=reason)
    if completed is not None:
        story.status["completionTime"] = at(completed)
    return story


def waiting() -> Story:
    """A job that waits for another, and says so."""
    story = Story(spec={"model": {"from": {"fineTuneJob": {"name": "parent"}}}})
    told = plan(story.seen(), NOW).status
    assert told is not None
    story.status = dict(told)
    return story


def test_a_thousand_resting_jobs_cost_a_list_of_each_kind() -> None:
    jobs = []
    for number in range(1000):
        job = document(ended("Succeeded"))
        job["metadata"]["name"] = f"job-{number}"
        jobs.append(job)
    cluster = Cluster(*jobs)
    taken = asyncio.run(Survey.take(cluster, []))
    assert cluster.asked == ["FineTuneJobs", "MergeJobs", "ModelDeployments", "Pods", "Jobs"]
    assert len(taken.resources()) == 1000
    assert all(found(taken, key) == Rest() for key in taken.resources())


def test_a_job_that_says_what_it_waits_for_rests() -> None:
    told = document(waiting())
    assert found(survey(told)) == Rest()
    parent = document(Story())
    parent["metadata"]["name"] = "parent"
    assert found(survey(told, parent)) is None, "the parent is there now, and the message says it is not"


def test_a_job_with_an_attempt_or_a_preflight_is_looked_at_by_itself() -> None:
    assert found(survey(document(Story().attempt(1)))) is None
    preflight = {"kind": "Job", "metadata": kept()["metadata"] | {"name": "job-preflight"}}
    assert found(survey(document(waiting()), preflight)) is None


def test_a_new_job_is_looked_at_by_itself() -> None:
    assert found(survey(document(Story()))) is None


def test_evidence_to_let_go_is_something_to_do() -> None:
    job = document(ended("Succeeded"))
    assert found(survey(job, kept())) is None
    assert found(survey(job, kept(finalizers=[]))) == Rest()


def test_evidence_of_a_resource_that_is_gone_is_found() -> None:
    taken = survey(kept())
    assert taken.resources() == {KEY}
    assert found(taken) is None


def test_what_time_alone_will_change_is_looked_at_then() -> None:
    story = ended("Succeeded", ttlSecondsAfterFinished=3_000_000)
    story.status["completionTime"] = "2126-01-01T00:00:00Z"
    rest = found(survey(document(story)))
    assert rest is not None
    assert rest.requeue_after is not None
    assert rest.requeue_after > 3_000_000


@pytest.mark.parametrize("kind", ["ConfigMap", "PyTorchJob", "Pod"])
def test_what_is_not_held_is_not_told(kind: str) -> None:
    taken = survey(kept(name="job-1"))
    with pytest.raises(NotHeld):
        asyncio.run(taken.get(kind, "ns", "job-1"))
    with pytest.raises(NotHeld):
        asyncio.run(taken.list(kind, "ns", "trimtab.dev/name=job"))


def test_what_is_known_not_to_exist_is_told() -> None:
    taken = survey(kept(name="job-1"))
    assert asyncio.run(taken.get("Pod", "ns", "job-2")) is None
    assert asyncio.run(taken.list("Pod", "ns", "trimtab.dev/name=job,trimtab.dev/attempt=2")) == []
