"""ModelDeployments on a real API server; the test plays the deployment controller, the kubelet and the agents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.client import Api
from tests.api.stage import DIGEST, FINE_TUNE_JOB, Object, OperatorProcess, Stage, eventually

SPEC: Object = {
    "model": {"name": "base", "from": {"s3": {"uri": "s3://models/llama"}}},
    "adapters": [{"name": "swift", "from": {"s3": {"uri": "s3://models/swift"}}}],
}
READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


@pytest.fixture
def stage(api: Api, namespace: str, operator: OperatorProcess) -> Stage:
    return Stage(api, namespace)


def report(stage: Stage, pod: Object, **adapters: str) -> None:
    """What the pod's agent says."""
    lines = [{"name": name, "digest": DIGEST, "reason": reason} for name, reason in adapters.items()]
    said = {"podUid": pod["metadata"]["uid"], "modelReady": True, "reason": "Serving", "adapters": lines}
    stage.patch("ConfigMap", "chat-reports", {"data": {pod["metadata"]["name"]: json.dumps(said)}})


def serving(stage: Stage, **changes: Any) -> Object:
    """A deployment of which one pod serves everything."""
    stage.ours("ModelDeployment", "chat", **{**SPEC, **changes})
    made = stage.until_there("Deployment", "chat-server")
    # Applied first and created afterwards: the operator makes the place for reports in the same look, but later.
    stage.until_there("ConfigMap", "chat-reports")
    pod = stage.pod_of(made, "chat-a", made["spec"]["template"], **READY)
    report(stage, pod, swift="Loaded")
    stage.until_says("ModelDeployment", "chat", "Serving")
    return pod


def desired(stage: Stage) -> Object:
    found: Object = json.loads((stage.get("ConfigMap", "chat-desired") or {})["data"]["serve.json"])
    return found


def template(stage: Stage) -> Object:
    found: Object = (stage.get("Deployment", "chat-server") or {})["spec"]["template"]["spec"]
    return found


def test_from_apply_to_serving(stage: Stage) -> None:
    pod = serving(stage)
    status = stage.status("ModelDeployment", "chat")
    assert status["url"] == f"http://chat-server.{stage.namespace}.svc/v1"
    assert (status["ready"], status["adaptersReady"]) == ("1/1", "1/1")
    assert status["adapters"][0] | {"message": ""} == {
        "name": "swift", "digest": DIGEST, "readyReplicas": 1, "reason": "Loaded", "message": ""
    }  # fmt: skip
    for kind in ("Service", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"):
        assert stage.get(kind, "chat-server"), kind
    policy = (stage.get("Service", "chat-server") or {})["spec"]
    assert policy["ports"][0]["port"] == 80
    assert policy["selector"].items() <= pod["metadata"]["labels"].items()


def test_it_waits_for_its_base_and_is_woken(stage: Stage) -> None:
    stage.ours("ModelDeployment", "chat", model={"from": {"fineTuneJob": {"name": "base"}}})
    stage.until_says("ModelDeployment", "chat", "Waiting")
    assert stage.get("Deployment", "chat-server") is None
    stage.ours("FineTuneJob", "base", **FINE_TUNE_JOB)
    stage.finished("base", "model")
    stage.until_there("Deployment", "chat-server")
    assert desired(stage)["model"]["source"]["s3"]["digest"] == DIGEST
    stage.until_says("ModelDeployment", "chat", "Starting")


def test_an_adapter_comes_and_goes_without_touching_the_pods(stage: Stage) -> None:
    pod = serving(stage)
    before = (stage.get("Deployment", "chat-server") or {})["metadata"]["generation"]
    adapters = [*SPEC["adapters"], {"name": "harbour", "from": {"s3": {"uri": "s3://models/harbour"}}}]
    stage.patch("ModelDeployment", "chat", {"spec": {"adapters": adapters}})
    eventually(lambda: len(desired(stage)["adapters"]) == 2, lambda: desired(stage))
    stage.until_says("ModelDeployment", "chat", "Loading")
    report(stage, pod, swift="Loaded", harbour="Loaded")
    stage.until_says("ModelDeployment", "chat", "Serving")
    stage.patch("ModelDeployment", "chat", {"spec": {"adapters": adapters[1:]}})
    eventually(lambda: [a["name"] for a in desired(stage)["adapters"]] == ["harbour"], lambda: desired(stage))
    assert (stage.get("Deployment", "chat-server") or {})["metadata"]["generation"] == before


def test_what_is_taken_out_of_the_spec_goes_from_the_pods(stage: Stage) -> None:
    serving(stage, pod={"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]})
    stage.patch("ModelDeployment", "chat", {"spec": {"pod": {"env": [{"name": "B", "value": "2"}]}}})

    def probe() -> bool:
        return [each["name"] for each in template(stage)["containers"][0].get("env", [])] == ["B"]

    eventually(probe, lambda: template(stage)["containers"][0])
    claim = {"volume": {"claimName": "adapters"}}
    stage.patch("ModelDeployment", "chat", {"spec": {"adapters": [{"name": "swift", "from": claim}]}})
    eventually(lambda: claims(stage) == ["adapters"], lambda: claims(stage))
    stage.patch("ModelDeployment", "chat", {"spec": {"adapters": SPEC["adapters"]}})
    eventually(lambda: not claims(stage), lambda: claims(stage))


def claims(stage: Stage) -> list[str]:
    volumes = template(stage)["volumes"]
    return [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]


def test_it_scales_by_its_subresource(stage: Stage) -> None:
    serving(stage)
    hashed = (stage.get("Deployment", "chat-server") or {})["metadata"]["annotations"]["trimtab.dev/spec-hash"]
    stage.patch("ModelDeployment", "chat", {"spec": {"replicas": 2}}, "scale")
    eventually(
        lambda: (stage.get("Deployment", "chat-server") or {})["spec"]["replicas"] == 2,
        lambda: stage.get("Deployment", "chat-server"),
    )
    assert "1 of 2" in stage.until_says("ModelDeployment", "chat", "ReplicasUnavailable")["message"]
    stage.until_there("PodDisruptionBudget", "chat-server")
    scale = stage.api.request("GET", stage.path("ModelDeployment", "chat", "scale")).body
    assert scale["status"]["replicas"] == 1
    assert "trimtab.dev/role=server" in scale["status"]["selector"]
    kept = stage.get("Deployment", "chat-server") or {}
    assert kept["metadata"]["annotations"]["trimtab.dev/spec-hash"] == hashed
    stage.patch("ModelDeployment", "chat", {"spec": {"replicas": 0}}, "scale")
    stage.until_says("ModelDeployment", "chat", "ScaledToZero")
    stage.until_gone("PodDisruptionBudget", "chat-server")


def test_deleted_children_come_back(stage: Stage) -> None:
    serving(stage)
    before = (stage.get("Deployment", "chat-server") or {})["metadata"]["uid"]
    stage.delete("Deployment", "chat-server")
    stage.delete("ConfigMap", "chat-desired")

    def probe() -> bool:
        made = stage.get("Deployment", "chat-server")
        return bool(made and made["metadata"]["uid"] != before and stage.get("ConfigMap", "chat-desired"))

    eventually(probe, lambda: stage.get("Deployment", "chat-server"))


def test_somebody_elses_service_is_left_alone(stage: Stage) -> None:
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat-server"}}
    made = stage.make({**theirs, "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}})
    stage.ours("ModelDeployment", "chat", **SPEC)
    said = stage.until_says("ModelDeployment", "chat", "NameConflict")
    assert said["status"] == "False"
    assert "Service chat-server exists" in said["message"]
    kept = stage.get("Service", "chat-server") or {}
    assert kept["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_the_report_of_a_pod_that_is_gone_is_taken_out(stage: Stage) -> None:
    pod = serving(stage)
    stage.delete("Pod", "chat-a")
    eventually(
        lambda: not (stage.get("ConfigMap", "chat-reports") or {}).get("data"),
        lambda: stage.get("ConfigMap", "chat-reports"),
    )
    said = stage.until_says("ModelDeployment", "chat", "ReplicasUnavailable")
    assert said["status"] == "False"
    assert pod["metadata"]["name"] == "chat-a"


def test_an_operator_that_starts_again_rolls_nothing(stage: Stage, operator: OperatorProcess) -> None:
    serving(stage)
    before = (stage.get("Deployment", "chat-server") or {})["metadata"]["resourceVersion"]
    seen = stage.status("ModelDeployment", "chat")
    operator.kill()
    operator.start()
    stage.patch("ModelDeployment", "chat", {"metadata": {"annotations": {"look": "again"}}, "spec": {"replicas": 1}})
    stage.patch("ModelDeployment", "chat", {"spec": {"adapters": []}})
    eventually(lambda: not desired(stage).get("adapters"), lambda: desired(stage))
    assert (stage.get("Deployment", "chat-server") or {})["metadata"]["resourceVersion"] == before
    assert stage.status("ModelDeployment", "chat")["startTime"] == seen["startTime"]
