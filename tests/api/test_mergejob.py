"""MergeJobs on a real API server; the test plays the job controller and the kubelet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Api
from tests.api.rooms import DIGEST, FINE_TUNE_JOB, Object, Operator, Room, eventually, now

SPEC: Object = {"adapters": [{"from": {"s3": {"uri": "s3://models/harbour"}}}]}


@pytest.fixture(scope="module")
def operator(operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    process = Operator(operator_kubeconfig, tmp_path_factory.mktemp("operator"))
    process.start()
    yield process
    process.kill()
    assert "this is a fault of the operator" not in process.log()


@pytest.fixture
def room(api: Api, namespace: str, operator: Operator) -> Room:
    return Room(api, namespace)


def fresh_job(room: Room, name: str, not_uid: str = "") -> Object:
    """The batch Job that is not the one before."""

    def probe() -> Object | None:
        job = room.get("Job", f"{name}-merge")
        return job if job and job["metadata"]["uid"] != not_uid and not deleting(job) else None

    return eventually(probe, lambda: (room.get("Job", f"{name}-merge"), room.status("MergeJob", name)), 40)


def deleting(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]


def run(room: Room, job: Object) -> Object:
    started = {"running": {"startedAt": now()}}
    return room.pod(job, f"p-{job['metadata']['uid'][:6]}", phase="Running", containerStatuses=[container(started)])


def container(state: Object) -> Object:
    return {"name": "merge", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def end(room: Room, pod: Object, code: int, **ending: Any) -> None:
    over = {"terminated": {"exitCode": code, "startedAt": now(), "finishedAt": now(), "message": json.dumps(ending)}}
    status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [container(over)]}
    room.patch("Pod", pod["metadata"]["name"], {"status": status}, "status")


def succeed(room: Room, name: str, pod: Object) -> None:
    uri = room.status("MergeJob", name)["resolved"]["outputUri"] + "/artifact"
    end(room, pod, 0, reason="Succeeded", artifact={"uri": uri, "digest": DIGEST, "kind": "model"})


def test_a_mistake_in_the_inputs_is_waited_for_and_mended_in_place(room: Room) -> None:
    room.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(room, "merged")
    end(room, run(room, first), 74, reason="BucketMissing", message="s3://models is missing.", hint="Create it.")
    said = room.says("MergeJob", "merged", "BucketMissing")
    assert (said["status"], said["message"]) == ("Unknown", "s3://models is missing. Create it.")
    room.gone("Job", "merged-merge")
    room.patch("MergeJob", "merged", {"spec": {"adapters": [{"from": {"s3": {"uri": "s3://right/harbour"}}}]}})
    second = fresh_job(room, "merged", first["metadata"]["uid"])
    config = (room.get("ConfigMap", "merged-merge") or {})["data"]["merge.json"]
    assert json.loads(config)["adapters"][0]["source"]["s3"]["uri"] == "s3://right/harbour"
    succeed(room, "merged", run(room, second))
    room.says("MergeJob", "merged", "Succeeded")
    status = room.status("MergeJob", "merged")
    assert status["artifact"]["digest"] == DIGEST
    assert status["attempt"] == 1
    assert status["completionTime"]
    assert room.get("Job", "merged-merge"), "the last pod and its log stay"


def test_it_waits_for_its_adapter_and_is_woken(room: Room) -> None:
    room.ours("MergeJob", "merged", adapters=[{"from": {"fineTuneJob": {"name": "harbour"}}}])
    assert "harbour, which does not exist" in room.says("MergeJob", "merged", "Waiting")["message"]
    room.ours("FineTuneJob", "harbour", **FINE_TUNE_JOB)
    eventually(
        lambda: "waits for" in room.leading("MergeJob", "merged")["message"],
        lambda: room.leading("MergeJob", "merged"),
    )
    room.finished("harbour", base={"uri": "s3://models/llama", "digest": DIGEST})
    fresh_job(room, "merged")
    config = json.loads((room.get("ConfigMap", "merged-merge") or {})["data"]["merge.json"])
    assert config["adapters"][0]["source"]["s3"]["digest"] == DIGEST
    assert config["base"]["s3"]["uri"] == "s3://models/llama"


def test_somebody_elses_job_is_left_alone(room: Room) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}
    theirs = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "merged-merge"}}
    made = room.make({**theirs, "spec": {"template": {"spec": pod}}})
    room.ours("MergeJob", "merged", **SPEC)
    assert "Job merged-merge exists" in room.says("MergeJob", "merged", "NameConflict")["message"]
    kept = room.get("Job", "merged-merge") or {}
    assert kept["metadata"]["uid"] == made["metadata"]["uid"]
    assert "ownerReferences" not in kept["metadata"]
    room.delete("Job", "merged-merge")
    fresh_job(room, "merged", made["metadata"]["uid"])
    room.says("MergeJob", "merged", "Pending")


def test_suspending_stops_the_pod_and_costs_nothing(room: Room) -> None:
    room.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(room, "merged")
    run(room, first)
    room.says("MergeJob", "merged", "Running")
    room.patch("MergeJob", "merged", {"spec": {"suspend": True}})
    room.says("MergeJob", "merged", "Suspended")
    room.gone("Job", "merged-merge")
    room.patch("MergeJob", "merged", {"spec": {"suspend": False}})
    second = fresh_job(room, "merged", first["metadata"]["uid"])
    succeed(room, "merged", run(room, second))
    room.says("MergeJob", "merged", "Succeeded")
    assert room.status("MergeJob", "merged").get("failures", 0) == 0


def test_an_operator_killed_meanwhile_counts_an_ending_once(room: Room, operator: Operator) -> None:
    room.ours("MergeJob", "merged", **SPEC)
    first = fresh_job(room, "merged")
    pod = run(room, first)
    room.says("MergeJob", "merged", "Running")
    operator.kill()
    end(room, pod, 1, reason="Crashed", message="boom")
    operator.start()
    second = fresh_job(room, "merged", first["metadata"]["uid"])
    assert second["metadata"]["labels"]["trimtab.dev/attempt"] == "2"
    room.says("MergeJob", "merged", "Pending")
    status = room.status("MergeJob", "merged")
    assert (status["failures"], status["attempt"]) == (1, 2)
    assert [(each["number"], each.get("reason")) for each in status["attempts"]] == [(1, "Crashed"), (2, None)]


def test_a_started_spec_is_fixed_and_a_time_to_live_ends_it(room: Room) -> None:
    room.ours("MergeJob", "merged", ttlSecondsAfterFinished=1, **SPEC)
    pod = run(room, fresh_job(room, "merged"))
    room.says("MergeJob", "merged", "Running")
    told = {"shard": 1, "totalShards": 3, "shards": "1/3", "updatedTime": now()}
    report = {"data": {"progress.json": json.dumps({"attempt": 0, "merge": told})}}
    room.patch("ConfigMap", "merged-merge-report", report)
    eventually(lambda: room.status("MergeJob", "merged").get("startTime"), lambda: room.status("MergeJob", "merged"))
    assert room.status("MergeJob", "merged")["progress"]["shards"] == "1/3"
    refused = room.api.request(
        "PATCH", room.path("MergeJob", "merged"), {"spec": {"dtype": "float32"}}, kind="application/merge-patch+json"
    )
    assert not refused.accepted
    assert "may not change once the job has started" in refused.message
    succeed(room, "merged", pod)
    room.gone("MergeJob", "merged")
    room.gone("Job", "merged-merge")


def test_deleting_it_takes_everything_along(room: Room) -> None:
    room.ours("MergeJob", "merged", **SPEC)
    pod = run(room, fresh_job(room, "merged"))
    room.delete("MergeJob", "merged")
    for kind, name in [("Job", "merged-merge"), ("ConfigMap", "merged-merge"), ("Role", "merged-merge")]:
        room.gone(kind, name)
    room.gone("Pod", pod["metadata"]["name"])
