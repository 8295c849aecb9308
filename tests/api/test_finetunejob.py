"""FineTuneJobs through the operator's process and a real API server; the test plays what runs pods."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from tests.api.client import Api
from tests.api.stage import DIGEST, Object, OperatorProcess, eventually
from tests.api.training import Training


@pytest.fixture
def stage(api: Api, namespace: str, operator: OperatorProcess) -> Training:
    return Training(api, namespace)


def output(stage: Training, name: str) -> str:
    uid = (stage.get("FineTuneJob", name) or {})["metadata"]["uid"]
    return f"s3://results/runs/{stage.namespace}/{name}/{uid}"


def held(stage: Training) -> list[str]:
    """The pods that cannot be deleted."""
    return [pod["metadata"]["name"] for pod in stage.items("Pod") if pod["metadata"].get("finalizers")]


def test_from_apply_to_an_artifact(stage: Training) -> None:
    stage.apply("swift", distributed={"nodes": 2})
    stage.until("swift", "Checking")
    stage.check("swift")
    master, worker = stage.gang("swift")
    stage.until("swift", "Running")
    assert master["metadata"]["finalizers"] == ["trimtab.dev/evidence"]
    stage.report("swift", 1, 5, loss=1.5)
    eventually(lambda: stage.told("swift").get("progress", {}).get("steps") == "5/10", "progress in status")
    stage.succeed(master, output(stage, "swift") + "/artifact")
    stage.end(worker, 0, {"reason": "Succeeded"})
    assert stage.until("swift", "Succeeded")["status"] == "True"
    status = stage.told("swift")
    assert status["artifact"]["digest"] == DIGEST
    assert [(each["number"], each["reason"]) for each in status["attempts"]] == [(1, "Succeeded")]
    assert status["resolved"]["image"] == "registry.test/trainer:1"
    eventually(lambda: not held(stage), "the evidence is let go")


def test_a_failed_pod_is_followed_by_another_attempt_and_its_evidence_stays_in_status(stage: Training) -> None:
    stage.apply("retry")
    stage.check("retry")
    (master,) = stage.gang("retry")
    stage.report("retry", 1, 4)
    stage.end(master, 75, {"reason": "Stalled", "message": "rank 1 is gone", "step": 4})
    (second,) = stage.gang("retry", 2, deadline=40)
    first = stage.told("retry")["attempts"][0]
    assert (first["reason"], first["exitCode"], first["toStep"]) == ("Stalled", 75, 4)
    assert "rank 1 is gone" in first["message"]
    assert stage.told("retry")["failures"] == 1
    stage.succeed(second, output(stage, "retry") + "/artifact")
    stage.until("retry", "Succeeded")


def test_a_mistake_in_the_inputs_waits_holds_nothing_and_is_looked_at_again(stage: Training) -> None:
    stage.apply("broken")
    words = {"reason": "DataInvalid", "message": "dataset.train[0] row 7: no answer", "hint": "Correct the row."}
    stage.check("broken", words, code=65)
    told = stage.until("broken", "DataInvalid")
    assert told["status"] == "Unknown"
    assert "row 7" in told["message"]
    assert not stage.items("PyTorchJob")
    stage.check("broken", deadline=40)
    stage.until_there("PyTorchJob", "broken-1")


def test_a_changed_spec_is_looked_at_at_once(stage: Training) -> None:
    stage.apply("mend")
    stage.check("mend", {"reason": "ObjectMissing", "message": "s3://data/rows.jsonl is not there"}, code=64)
    stage.until("mend", "ObjectMissing")
    other = {"dataset": {"train": [{"from": {"s3": {"uri": "s3://data/other.jsonl"}}}]}}
    stage.patch("FineTuneJob", "mend", {"spec": other})
    stage.check("mend", deadline=10)
    stage.until_there("PyTorchJob", "mend-1")


def test_a_job_waits_for_the_job_it_refers_to_and_follows_its_artifact(stage: Training) -> None:
    stage.apply("child", model={"from": {"fineTuneJob": {"name": "parent"}}})
    assert "FineTuneJob parent" in stage.until("child", "Waiting")["message"]
    assert not stage.items("Job")
    stage.apply("parent", model={"scratch": SCRATCH})
    stage.check("parent")
    (master,) = stage.gang("parent")
    uri = output(stage, "parent") + "/artifact"
    stage.end(master, 0, {"reason": "Succeeded", "artifact": {"uri": uri, "digest": DIGEST, "kind": "model"}})
    stage.check("child", deadline=10)
    stage.until_there("PyTorchJob", "child-1")
    config = stage.until_there("ConfigMap", "child-1-run")["data"]["run.json"]
    assert uri in config
    assert DIGEST in config


CLOSE = {"python": {"configMapKeyRef": {"name": "rewards", "key": "rewards.py"}, "function": "close"}}


def test_code_of_the_user_s_waits_for_the_installation_s_leave(stage: Training, operator: OperatorProcess) -> None:
    """The job goes on by itself once the installation allows it; its pods see the one key, read-only."""
    stage.apply("coded", method="grpo", grpo={"rewards": [CLOSE]})
    told = stage.until("coded", "SpecInvalid")
    assert told["status"] == "Unknown"
    assert "rewards.python: true" in told["message"]
    assert not stage.items("Job")
    forbidding = operator.settings
    operator.stop()
    operator.settings = {**forbidding, "rewards": {"python": True}}
    operator.start()
    stage.check("coded")
    (master,) = stage.gang("coded")
    operator.stop()
    operator.settings = forbidding
    operator.start()
    items = [{"key": "rewards.py", "path": "rewards.py"}]
    (volume,) = [each for each in master["spec"]["volumes"] if each.get("configMap", {}).get("name") == "rewards"]
    assert volume["configMap"]["items"] == items
    mounts = {each["name"]: each for each in master["spec"]["containers"][0]["volumeMounts"]}
    mount = mounts[volume["name"]]
    assert (mount["mountPath"], mount["readOnly"]) == ("/var/run/trimtab/code/rewards", True)
    config = json.loads(stage.until_there("ConfigMap", "coded-1-run")["data"]["run.json"])
    assert [each["path"] for each in config["code"]] == ["/var/run/trimtab/code/rewards/rewards.py"]


SCRATCH = {
    "modelType": "llama",
    "hiddenSize": 64,
    "layers": 2,
    "attentionHeads": 4,
    "tokenizer": {"train": {"vocabSize": 512}},
}


def test_suspend_ends_the_attempt_unbilled_and_resume_goes_on(stage: Training) -> None:
    stage.apply("pause")
    stage.check("pause")
    (master,) = stage.gang("pause")
    stage.until("pause", "Running")
    stage.patch("FineTuneJob", "pause", {"spec": {"suspend": True}})
    stage.until_gone("PyTorchJob", "pause-1")
    stage.end(master, 76, {"reason": "Preempted", "message": "step 7 is saved", "step": 7})
    stage.until("pause", "Suspended")
    eventually(lambda: stage.told("pause")["attempts"][0].get("endTime"), "the attempt is closed")
    eventually(lambda: not stage.items("Pod", "trimtab.dev/role=trainer"), "no pod is held")
    status = stage.told("pause")
    assert status["attempts"][0]["toStep"] == 7
    assert (status.get("failures", 0), status.get("preemptions", 0)) == (0, 0)
    stage.patch("FineTuneJob", "pause", {"spec": {"suspend": False}})
    stage.until_there("PyTorchJob", "pause-2")


def test_suspended_from_the_start_makes_nothing(stage: Training) -> None:
    stage.apply("later", suspend=True)
    stage.until("later", "Suspended")
    assert not stage.items("Job")
    stage.patch("FineTuneJob", "later", {"spec": {"suspend": False}})
    stage.check("later")
    stage.until_there("PyTorchJob", "later-1")


def test_a_deleted_pod_counts_as_a_preemption(stage: Training) -> None:
    stage.apply("drain", retries={"limit": 0})
    stage.check("drain")
    (master,) = stage.gang("drain")
    stage.until("drain", "Running")
    stage.delete("Pod", master["metadata"]["name"])
    stage.end(master, 76, {"reason": "Preempted", "message": "step 3 is saved", "step": 3})
    stage.until_there("PyTorchJob", "drain-2", 40)
    status = stage.told("drain")
    assert status["attempts"][0]["reason"] == "Preempted"
    assert (status.get("failures", 0), status["preemptions"]) == (0, 1)


def test_what_stands_around_a_gang_comes_back_when_it_is_deleted(stage: Training) -> None:
    stage.apply("bare")
    stage.check("bare")
    stage.gang("bare")
    stage.until("bare", "Running")
    for kind, name in [("ConfigMap", "bare-progress"), ("ConfigMap", "bare-1-run"), ("Role", "bare-trainer")]:
        before = stage.until_there(kind, name)
        stage.delete(kind, name)
        if kind == "Role":  # its loss is noticed by the silence that it brings about
            stage.report("bare", 1, 5, updatedTime="2026-01-01T00:00:00Z")

        def back(kind: str = kind, name: str = name, uid: str = before["metadata"]["uid"]) -> bool:
            found = stage.get(kind, name)
            return found is not None and found["metadata"]["uid"] != uid

        eventually(back, f"{kind} {name} is back", 40)
    assert stage.told("bare")["attempt"] == 1


def test_a_gang_that_somebody_deletes_goes_on_from_its_checkpoint(stage: Training) -> None:
    stage.apply("taken", retries={"limit": 0})
    stage.check("taken")
    (master,) = stage.gang("taken")
    stage.until("taken", "Running")
    stage.delete("PyTorchJob", "taken-1")
    eventually(lambda: told_to_leave(stage, master), "the garbage collector reaches the pod")
    assert stage.get("PyTorchJob", "taken-2") is None, "no second gang while a pod of the first may still write"
    stage.end(master, 76, {"reason": "Preempted", "message": "step 6 is saved", "step": 6})
    stage.until_there("PyTorchJob", "taken-2", 40)
    first = stage.told("taken")["attempts"][0]
    assert (first["reason"], first["toStep"]) == ("Preempted", 6)
    assert stage.told("taken").get("failures", 0) == 0


def told_to_leave(stage: Training, pod: Object) -> bool:
    return "deletionTimestamp" in (stage.get("Pod", pod["metadata"]["name"]) or {"metadata": {}})["metadata"]


def test_a_queue_holds_a_gang_sends_it_away_and_lets_it_back_within_one_attempt(stage: Training) -> None:
    """Kueue sets runPolicy.suspend; training-operator then deletes the pods, and makes them again afterwards."""
    stage.apply("turn", retries={"limit": 0, "preemptions": 0})
    stage.patch("FineTuneJob", "turn", {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team"}}})
    stage.check("turn")
    made = stage.until_there("PyTorchJob", "turn-1")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    stage.suspend("turn-1", True)
    assert "its queue team" in stage.until("turn", "Queued")["message"]
    stage.suspend("turn-1", False)
    (first,) = stage.gang("turn", node="node")
    stage.until("turn", "Running")
    stage.report("turn", 1, 5)
    stage.suspend("turn-1", True)
    stage.delete("Pod", first["metadata"]["name"])
    stage.until("turn", "Queued")
    time.sleep(1)  # the server's clock counts seconds: the kubelet's second deletion is later than the first
    stage.end(first, 76, {"reason": "Preempted", "message": "step 6 is saved", "step": 6})
    stage.until_gone("Pod", first["metadata"]["name"])
    time.sleep(1)  # the server's clock counts seconds, and the next admission is a later one
    stage.suspend("turn-1", False)
    (second,) = stage.gang("turn")
    stage.until("turn", "Running")
    told = stage.told("turn")
    assert (told["attempt"], len(told["attempts"]), told["attempts"][0]["toStep"]) == (1, 1, 6)
    assert (told.get("failures", 0), told.get("preemptions", 0)) == (0, 0)
    stage.succeed(second, output(stage, "turn") + "/artifact")
    stage.until("turn", "Succeeded")


def test_the_last_retry_used_up_is_final_and_says_why(stage: Training) -> None:
    stage.apply("doomed", retries={"limit": 0})
    stage.check("doomed")
    (master,) = stage.gang("doomed")
    stage.end(master, 1)
    told = stage.until("doomed", "Crashed")
    assert told["status"] == "False"
    assert "retries.limit" in told["message"]


def test_an_ended_pod_without_a_digest_is_no_success(stage: Training) -> None:
    stage.apply("empty", retries={"limit": 0})
    stage.check("empty")
    (master,) = stage.gang("empty")
    stage.end(master, 0, {"reason": "Succeeded"})
    assert stage.until("empty", "Crashed")["status"] == "False"


def test_a_deadline_ends_the_job_and_its_pods(stage: Training) -> None:
    stage.apply("slow", activeDeadlineSeconds=3)
    stage.check("slow")
    (master,) = stage.gang("slow")
    stage.until_gone("PyTorchJob", "slow-1")
    stage.end(master, 76, {"reason": "Preempted", "step": 2})
    assert stage.until("slow", "DeadlineExceeded")["status"] == "False"


def test_ttl_deletes_the_resource(stage: Training) -> None:
    stage.apply("brief", ttlSecondsAfterFinished=1)
    stage.check("brief")
    (master,) = stage.gang("brief")
    stage.succeed(master, output(stage, "brief") + "/artifact")
    stage.until_gone("FineTuneJob", "brief", 30)


def test_deletion_lets_pods_go_and_a_namesake_inherits_nothing(stage: Training) -> None:
    stage.apply("again")
    stage.check("again")
    stage.gang("again")
    stage.report("again", 1, 5)
    stage.until("again", "Running")
    stage.delete("FineTuneJob", "again")
    stage.apply("again")
    eventually(lambda: not stage.items("Pod", "trimtab.dev/role=trainer"), "the pods are gone", 40)
    stage.check("again", deadline=40)
    stage.until_there("PyTorchJob", "again-1", 60)
    assert "progress" not in stage.told("again")


def test_a_foreign_object_is_left_alone_and_named(stage: Training) -> None:
    stage.make({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine-progress"}, "data": {"a": "b"}})
    stage.apply("mine")
    stage.check("mine")
    assert "mine-progress" in stage.until("mine", "NameConflict")["message"]
    assert (stage.get("ConfigMap", "mine-progress") or {})["data"] == {"a": "b"}
    stage.delete("ConfigMap", "mine-progress")
    stage.until_there("PyTorchJob", "mine-1", 60)


def test_an_attempt_that_is_refused_is_taken_back_and_spec_can_be_mended(
    stage: Training, kubectl: Callable[..., str]
) -> None:
    kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(refusing_workers(stage.namespace)))
    probe = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe"}, "spec": GANG}
    eventually(lambda: not stage.try_make(probe, dryRun="All").accepted, "the policy works")
    stage.apply("wide", distributed={"nodes": 2})
    stage.check("wide")
    assert "no workers here" in stage.until("wide", "PodsRefused", 40)["message"]
    eventually(lambda: "startTime" not in stage.told("wide"), "the attempt is taken back")
    stage.patch("FineTuneJob", "wide", {"spec": {"distributed": {"nodes": 1}}})
    stage.check("wide", deadline=40)
    stage.gang("wide", deadline=40)
    stage.until("wide", "Running")
    assert [each["number"] for each in stage.told("wide")["attempts"]] == [1]
    config = json.loads((stage.get("ConfigMap", "wide-1-run") or {})["data"]["run.json"])
    assert config["spec"]["distributed"]["nodes"] == 1


POD: Object = {"spec": {"containers": [{"name": "pytorch", "image": "i"}]}}
GANG = {"pytorchReplicaSpecs": {"Master": {"template": POD}, "Worker": {"template": POD}}}


def refusing_workers(namespace: str) -> Object:
    """A policy of the cluster that takes no PyTorchJob with workers in this namespace."""
    rules = {"apiGroups": ["kubeflow.org"], "apiVersions": ["*"], "resources": ["pytorchjobs"]}
    where = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    lone = {"expression": "!has(object.spec.pytorchReplicaSpecs.Worker)", "message": "no workers here"}
    api = "admissionregistration.k8s.io/v1"
    policy = {
        "apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {**where, "resourceRules": [{**rules, "operations": ["CREATE"]}]},
            "validations": [lone],
        },
    }  # fmt: skip
    binding = {
        "apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": namespace},
        "spec": {"policyName": namespace, "validationActions": ["Deny"]},
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "List", "items": [policy, binding]}


def test_a_report_that_no_status_can_hold_stops_nothing(stage: Training) -> None:
    stage.apply("wild")
    stage.check("wild")
    (master,) = stage.gang("wild")
    stage.until("wild", "Running")
    stage.report("wild", 1, 3, loss=float("nan"), gradNorm=float("inf"))
    eventually(lambda: stage.told("wild").get("progress", {}).get("step") == 3, "the step is believed")
    assert "loss" not in stage.told("wild")["progress"]
    stage.report("wild", 1, 10**40)
    stage.report("wild", 1, 4, updatedTime="yesterday")
    stage.patch("ConfigMap", "wild-progress", {"data": {"progress.json": "[" * 10000}})
    stage.succeed(master, output(stage, "wild") + "/artifact")
    stage.until("wild", "Succeeded")


def test_a_missing_secret_is_told_by_the_pods_warning(stage: Training) -> None:
    stage.apply("secretless")
    job = stage.until_there("Job", "secretless-preflight")
    pod = stage.pod_of(job, "secretless-preflight-x", job["spec"]["template"])
    stage.patch("Pod", pod["metadata"]["name"], {"status": {"phase": "Pending"}}, "status")
    volume = next(each["name"] for each in pod["spec"]["volumes"] if each["name"].startswith("credentials-"))
    stage.make(
        {
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "warned"},
            "type": "Warning", "reason": "FailedMount",
            "message": f'MountVolume.SetUp failed for volume "{volume}" : secret "s3" not found',
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": stage.namespace,
                               "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]},
            "lastTimestamp": "2026-01-01T00:00:00Z",
        }
    )  # fmt: skip
    assert "Secret s3" in stage.until("secretless", "CredentialsMissing", 30)["message"]


def test_the_restart_of_the_operator_changes_nothing_that_runs(stage: Training, operator: OperatorProcess) -> None:
    stage.apply("steady")
    stage.check("steady")
    (master,) = stage.gang("steady")
    stage.until("steady", "Running")
    before = stage.until_there("PyTorchJob", "steady-1")["metadata"]["resourceVersion"]
    operator.kill()
    operator.settings["images"] = {"trainer": "registry.test/trainer:2", "server": "registry.test/server:2"}
    stage.report("steady", 1, 6)
    operator.start()
    eventually(lambda: stage.told("steady").get("progress", {}).get("step") == 6, "the restarted one reads on")
    assert stage.until_there("PyTorchJob", "steady-1")["metadata"]["resourceVersion"] == before
    assert stage.told("steady")["resolved"]["image"] == "registry.test/trainer:1"
    stage.end(master, 75, {"reason": "Stalled", "step": 6})
    second = stage.until_there("PyTorchJob", "steady-2", 40)
    template = second["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert template["spec"]["containers"][0]["image"] == "registry.test/trainer:1"
