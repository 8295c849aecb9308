"""MergeJobs on a real API server; the test plays the job controller and the kubelet."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.client import Api
from tests.api.stage import DIGEST, FINE_TUNE_JOB, Object, OperatorProcess, Stage, eventually, now

SPEC: Object = {"adapters": [{"from": {"s3": {"uri": "s3://models/harbour"}}}]}


@pytest.fixture
def stage(api: Api, namespace: str, operator: OperatorProcess) -> Stage:
    return Stage(api, namespace)


def fresh_job(stage: Stage, name: str, not_uid: str = "") -> Object:
    """The batch Job that is not the one before."""

    def probe() -> Object | None:
        job = stage.get("Job", f"{name}-merge")
        return job if job and job["metadata"]["uid"] != not_uid and not deleting(job) else None

    return eventually(probe, lambda: (stage.get("Job", f"{name}-merge"), stage.status("MergeJob", name)), 40)


def deleting(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def run(stage: Stage, job: Object) -> Object:
    started = {"running": {"startedAt": now()}}
    name, template = f"p-{job['metadata']['uid'][:6]}", job["spec"]["template"]
    return stage.pod_of(job, name, template, phase="Running", containerStatuses=[container(started)])


def container(state: Object) -> Object:
    return {"name": "merge", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def end(stage: Stage, pod: Object, code: int, **ending: Any) -> None:
    over = {"terminated": {"exitCode": code, "startedAt": now(), "finishedAt": now(), "message": json.dumps(ending)}}
    status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [container(over)]}
    stage.patch("Pod", pod["metadata"]["name"], {"status": status}, "status")


def succeed(stage: Stage, name: str, pod: Object) -> None:
    uri = stage.status("MergeJob", name)["resolved"]["outputUri"] + "/artifact"
    end(stage, pod, 0, reason="Succeeded", artifact={"uri": uri, "digest": DIGEST, "kind": "model"})


def test_a_mistake_in_the_inputs_is_waited_for_and_mended_in_place(stage: Stage) -> None:
    stage.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(stage, "merged")
    end(stage, run(stage, first), 74, reason="BucketMissing", message="s3://models is missing.", hint="Create it.")
    said = stage.until_says("MergeJob", "merged", "BucketMissing")
    assert (said["status"], said["message"]) == ("Unknown", "s3://models is missing. Create it.")
    stage.until_gone("Job", "merged-merge")
    stage.patch("MergeJob", "merged", {"spec": {"adapters": [{"from": {"s3": {"uri": "s3://right/harbour"}}}]}})
    second = fresh_job(stage, "merged", first["metadata"]["uid"])
    config = (stage.get("ConfigMap", "merged-merge") or {})["data"]["merge.json"]
    assert json.loads(config)["adapters"][0]["source"]["s3"]["uri"] == "s3://right/harbour"
    succeed(stage, "merged", run(stage, second))
    stage.until_says("MergeJob", "merged", "Succeeded")
    status = stage.status("MergeJob", "merged")
    assert status["artifact"]["digest"] == DIGEST
    assert status["attempt"] == 1
    assert status["completionTime"]
    assert stage.get("Job", "merged-merge"), "the last pod and its log stay"


def test_it_waits_for_its_adapter_and_is_woken(stage: Stage) -> None:
    stage.ours("MergeJob", "merged", adapters=[{"from": {"fineTuneJob": {"name": "harbour"}}}])
    assert "harbour, which does not exist" in stage.until_says("MergeJob", "merged", "Waiting")["message"]
    stage.ours("FineTuneJob", "harbour", **FINE_TUNE_JOB)
    eventually(
        lambda: "waits for" in stage.leading("MergeJob", "merged")["message"],
        lambda: stage.leading("MergeJob", "merged"),
    )
    stage.finished("harbour", base={"uri": "s3://models/llama", "digest": DIGEST})
    fresh_job(stage, "merged")
    config = json.loads((stage.get("ConfigMap", "merged-merge") or {})["data"]["merge.json"])
    assert config["adapters"][0]["source"]["s3"]["digest"] == DIGEST
    assert config["base"]["s3"]["uri"] == "s3://models/llama"


def test_somebody_elses_job_is_left_alone(stage: Stage) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}
    theirs = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "merged-merge"}}
    made = stage.make({**theirs, "spec": {"template": {"spec": pod}}})
    stage.ours("MergeJob", "merged", **SPEC)
    assert "Job merged-merge exists" in stage.until_says("MergeJob", "merged", "NameConflict")["message"]
    kept = stage.get("Job", "merged-merge") or {}
    assert kept["metadata"]["uid"] == made["metadata"]["uid"]
    assert "ownerReferences" not in kept["metadata"]
    stage.delete("Job", "merged-merge")
    fresh_job(stage, "merged", made["metadata"]["uid"])
    stage.until_says("MergeJob", "merged", "Pending")


def test_suspending_stops_the_pod_and_costs_nothing(stage: Stage) -> None:
    stage.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(stage, "merged")
    run(stage, first)
    stage.until_says("MergeJob", "merged", "Running")
    stage.patch("MergeJob", "merged", {"spec": {"suspend": True}})
    stage.until_says("MergeJob", "merged", "Suspended")
    stage.until_gone("Job", "merged-merge")
    stage.patch("MergeJob", "merged", {"spec": {"suspend": False}})
    second = fresh_job(stage, "merged", first["metadata"]["uid"])
    succeed(stage, "merged", run(stage, second))
    stage.until_says("MergeJob", "merged", "Succeeded")
    assert stage.status("MergeJob", "merged").get("failures", 0) == 0


def test_an_operator_killed_meanwhile_counts_an_ending_once(stage: Stage, operator: OperatorProcess) -> None:
    stage.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(stage, "merged")
    pod = run(stage, first)
    stage.until_says("MergeJob", "merged", "Running")
    operator.kill()
    end(stage, pod, 1, reason="Crashed", message="boom")
    operator.start()
    second = fresh_job(stage, "merged", first["metadata"]["uid"])
    assert second["metadata"]["labels"]["trimtab.dev/attempt"] == "2"
    stage.until_says("MergeJob", "merged", "Pending")
    status = stage.status("MergeJob", "merged")
    assert (status["failures"], status["attempt"]) == (1, 2)
    assert [(each["number"], each.get("reason")) for each in status["attempts"]] == [(1, "Crashed"), (2, None)]


def test_a_started_spec_is_fixed_and_a_time_to_live_ends_it(stage: Stage) -> None:
    stage.ours("MergeJob", "merged", ttlSecondsAfterFinished=1, **SPEC)
    pod = run(stage, fresh_job(stage, "merged"))
    stage.until_says("MergeJob", "merged", "Running")
    told = {"shard": 1, "totalShards": 3, "shards": "1/3", "updatedTime": now()}
    report = {"data": {"progress.json": json.dumps({"attempt": 0, "merge": told})}}
    stage.patch("ConfigMap", "merged-merge-report", report)
    eventually(lambda: stage.status("MergeJob", "merged").get("startTime"), lambda: stage.status("MergeJob", "merged"))
    assert stage.status("MergeJob", "merged")["progress"]["shards"] == "1/3"
    refused = stage.try_patch("MergeJob", "merged", {"spec": {"dtype": "float32"}})
    assert not refused.accepted
    assert "may not change once the job has started" in refused.message
    succeed(stage, "merged", pod)
    stage.until_gone("MergeJob", "merged")
    stage.until_gone("Job", "merged-merge")


def test_deleting_it_takes_everything_along(stage: Stage) -> None:
    stage.ours("MergeJob", "merged", **SPEC)
    pod = run(stage, fresh_job(stage, "merged"))
    stage.delete("MergeJob", "merged")
    for kind, name in [("Job", "merged-merge"), ("ConfigMap", "merged-merge"), ("Role", "merged-merge")]:
        stage.until_gone(kind, name)
    stage.until_gone("Pod", pod["metadata"]["name"])
