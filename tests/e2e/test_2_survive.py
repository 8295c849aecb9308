"""Jobs that survive: pods, operator and storage are taken away in mid-run, and the weights come out the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from demo.cluster import Cluster, lab
from demo.install import NAMESPACE
from tests.e2e.workspace import Workspace, eventually, example, kill_processes, workspace_named
from tests.matrix import proves

STEPS = 300


@pytest.fixture(scope="module")
def work(cluster: Cluster, line: Workspace) -> Iterator[Workspace]:
    """A namespace whose jobs start from the base that the line trained."""
    line.until_true("finetunejob", "base", 240)
    made = workspace_named(cluster, "e2e-survive")
    yield made
    cluster.kubectl("delete", "namespace", made.namespace, "--wait", timeout=240)


def job(line: Workspace, name: str, nodes: int = 2, **spec: Any) -> dict[str, Any]:
    """A two-node job long enough to be disturbed."""
    document = example("harbour")
    document["metadata"]["name"] = name
    artifact = line.get("finetunejob", "base")["status"]["artifact"]
    document["spec"]["model"] = {"from": {"s3": {"uri": artifact["uri"]}}}
    document["spec"]["distributed"] = {"nodes": nodes}
    document["spec"]["tuner"]["lora"]["dropout"] = 0.1
    document["spec"]["training"].update({"maxSteps": STEPS, "loggingSteps": 5, "learningRate": 5e-4})
    document["spec"]["checkpoint"] = {"saveSteps": 20}
    document["spec"].update(spec)
    return document


@pytest.fixture(scope="module")
def calm(work: Workspace, line: Workspace) -> dict[str, str]:
    """The weights of a run that nobody disturbs."""
    work.apply(job(line, "calm"))
    work.until_true("finetunejob", "calm", 300)
    return work.weights("calm")


@proves("sft", "resume")
def test_a_killed_pod_and_a_killed_operator_change_no_weight(
    work: Workspace, line: Workspace, calm: dict[str, str]
) -> None:
    work.apply(job(line, "shaken"))
    work.until_step("shaken", 45, 180)
    if not kill_processes("shaken-1-worker-0"):
        pytest.skip("the trainer runs on another computer")
    work.cluster.kubectl("-n", NAMESPACE, "delete", "pod", "--all", "--grace-period=0", "--force")
    done = work.until_true("finetunejob", "shaken", 300)
    attempts = done["status"]["attempts"]
    assert len(attempts) == 2
    assert attempts[1]["fromStep"] >= 20
    assert attempts[1]["fromStep"] % 20 == 0
    assert work.weights("shaken") == calm


def test_a_drained_pod_saves_a_common_step_and_spends_no_retry(
    work: Workspace, line: Workspace, calm: dict[str, str]
) -> None:
    work.apply(job(line, "drained", retries={"limit": 0}))
    work.until_step("drained", 45, 180)
    work.kubectl("delete", "pod", "drained-1-worker-0", "--wait=false")
    done = work.until_true("finetunejob", "drained", 300)
    first, second = done["status"]["attempts"]
    assert first["reason"] == "Preempted"
    assert second["fromStep"] == first["toStep"]
    assert second["fromStep"] % 20 != 0 or second["fromStep"] > 40
    assert done["status"].get("failures", 0) == 0
    assert work.weights("drained") == calm


def test_storage_that_is_away_for_twenty_seconds_costs_no_attempt(
    work: Workspace, line: Workspace, calm: dict[str, str]
) -> None:
    work.apply(job(line, "cut"))
    work.until_step("cut", 25, 180)
    lab("stop", "s3")
    back = threading.Timer(20, lab, ("start", "s3"))
    back.start()
    try:
        done = work.until_true("finetunejob", "cut", 300)
    finally:
        back.join()
    assert len(done["status"]["attempts"]) == 1
    assert work.weights("cut") == calm


def test_a_suspended_job_holds_no_pod_and_goes_on_where_it_was(work: Workspace, line: Workspace) -> None:
    work.apply(job(line, "paused", nodes=1))
    work.until_step("paused", 25, 180)
    work.patch("finetunejob", "paused", {"suspend": True})
    work.until_reason("finetunejob", "paused", "Suspended", 90)
    eventually(lambda: not work.find("pods", "-l", "trimtab.dev/name=paused,trimtab.dev/role=trainer"), 60, "pods stay")
    work.patch("finetunejob", "paused", {"suspend": False})
    done = work.until_true("finetunejob", "paused", 240)
    assert done["status"]["attempts"][-1]["fromStep"] >= 20
    assert done["status"].get("failures", 0) == 0


def test_deletion_stops_the_pods(work: Workspace, line: Workspace) -> None:
    work.apply(job(line, "unwanted"))
    work.until_step("unwanted", 5, 180)
    work.kubectl("delete", "finetunejob", "unwanted", "--wait=false")
    eventually(lambda: not work.find("pods", "-l", "trimtab.dev/name=unwanted"), 90, "pods stay")
    eventually(lambda: not work.find("pytorchjobs", "-l", "trimtab.dev/name=unwanted"), 30, "the PyTorchJob stays")
