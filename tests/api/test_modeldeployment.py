"""ModelDeployments on a real API server; the test plays the deployment controller, the kubelet and the agents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Api
from tests.api.rooms import DIGEST, FINE_TUNE_JOB, Object, Operator, Room, eventually

SPEC: Object = {
    "model": {"name": "base", "from": {"s3": {"uri": "s3://models/llama"}}},
    "adapters": [{"name": "swift", "from": {"s3": {"uri": "s3://models/swift"}}}],
}
READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


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


def report(room: Room, pod: Object, **adapters: str) -> None:
    """What the pod's agent says."""
    lines = [{"name": name, "digest": DIGEST, "reason": reason} for name, reason in adapters.items()]
    said = {"podUid": pod["metadata"]["uid"], "modelReady": True, "reason": "Serving", "adapters": lines}
    room.patch("ConfigMap", "chat-reports", {"data": {pod["metadata"]["name"]: json.dumps(said)}})


def serving(room: Room, **changes: Any) -> Object:
    """A deployment of which one pod serves everything."""
    room.ours("ModelDeployment", "chat", **{**SPEC, **changes})
    pod = room.pod(room.there("Deployment", "chat-server"), "chat-a", **READY)
    report(room, pod, swift="Loaded")
    room.says("ModelDeployment", "chat", "Serving")
    return pod


def desired(room: Room) -> Object:
    found: Object = json.loads((room.get("ConfigMap", "chat-desired") or {})["data"]["serve.json"])
    return found


def template(room: Room) -> Object:
    found: Object = (room.get("Deployment", "chat-server") or {})["spec"]["template"]["spec"]
    return found


def test_from_apply_to_serving(room: Room) -> None:
    pod = serving(room)
    status = room.status("ModelDeployment", "chat")
    assert status["url"] == f"http://chat-server.{room.namespace}.svc/v1"
    assert (status["ready"], status["adaptersReady"]) == ("1/1", "1/1")
    assert status["adapters"][0] | {"message": ""} == {
        "name": "swift", "digest": DIGEST, "readyReplicas": 1, "reason": "Loaded", "message": ""
    }  # fmt: skip
    for kind in ("Service", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"):
        assert room.get(kind, "chat-server"), kind
    policy = (room.get("Service", "chat-server") or {})["spec"]
    assert policy["ports"][0]["port"] == 80
    assert policy["selector"].items() <= pod["metadata"]["labels"].items()


def test_it_waits_for_its_base_and_is_woken(room: Room) -> None:
    room.ours("ModelDeployment", "chat", model={"from": {"fineTuneJob": {"name": "base"}}})
    room.says("ModelDeployment", "chat", "Waiting")
    assert room.get("Deployment", "chat-server") is None
    room.ours("FineTuneJob", "base", **FINE_TUNE_JOB)
    room.finished("base", "model")
    room.there("Deployment", "chat-server")
    assert desired(room)["model"]["source"]["s3"]["digest"] == DIGEST
    room.says("ModelDeployment", "chat", "Starting")


def test_an_adapter_comes_and_goes_without_touching_the_pods(room: Room) -> None:
    pod = serving(room)
    before = (room.get("Deployment", "chat-server") or {})["metadata"]["generation"]
    adapters = [*SPEC["adapters"], {"name": "harbour", "from": {"s3": {"uri": "s3://models/harbour"}}}]
    room.patch("ModelDeployment", "chat", {"spec": {"adapters": adapters}})
    eventually(lambda: len(desired(room)["adapters"]) == 2, lambda: desired(room))
    room.says("ModelDeployment", "chat", "Loading")
    report(room, pod, swift="Loaded", harbour="Loaded")
    room.says("ModelDeployment", "chat", "Serving")
    room.patch("ModelDeployment", "chat", {"spec": {"adapters": adapters[1:]}})
    eventually(lambda: [a["name"] for a in desired(room)["adapters"]] == ["harbour"], lambda: desired(room))
    assert (room.get("Deployment", "chat-server") or {})["metadata"]["generation"] == before


def test_what_is_taken_out_of_the_spec_goes_from_the_pods(room: Room) -> None:
    serving(room, pod={"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]})
    room.patch("ModelDeployment", "chat", {"spec": {"pod": {"env": [{"name": "B", "value": "2"}]}}})

    def probe() -> bool:
        return [each["name"] for each in template(room)["containers"][0].get("env", [])] == ["B"]

    eventually(probe, lambda: template(room)["containers"][0])
    claim = {"volume": {"claimName": "adapters"}}
    room.patch("ModelDeployment", "chat", {"spec": {"adapters": [{"name": "swift", "from": claim}]}})
    eventually(lambda: claims(room) == ["adapters"], lambda: claims(room))
    room.patch("ModelDeployment", "chat", {"spec": {"adapters": SPEC["adapters"]}})
    eventually(lambda: not claims(room), lambda: claims(room))


def claims(room: Room) -> list[str]:
    volumes = template(room)["volumes"]
    return [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]


def test_it_scales_by_its_subresource(room: Room) -> None:
    serving(room)
    hashed = (room.get("Deployment", "chat-server") or {})["metadata"]["annotations"]["trimtab.dev/spec-hash"]
    room.patch("ModelDeployment", "chat", {"spec": {"replicas": 2}}, "scale")
    eventually(
        lambda: (room.get("Deployment", "chat-server") or {})["spec"]["replicas"] == 2,
        lambda: room.get("Deployment", "chat-server"),
    )
    assert "1 of 2" in room.says("ModelDeployment", "chat", "ReplicasUnavailable")["message"]
    room.there("PodDisruptionBudget", "chat-server")
    scale = room.api.request("GET", room.path("ModelDeployment", "chat", "scale")).body
    assert scale["status"]["replicas"] == 1
    assert "trimtab.dev/role=server" in scale["status"]["selector"]
    kept = room.get("Deployment", "chat-server") or {}
    assert kept["metadata"]["annotations"]["trimtab.dev/spec-hash"] == hashed
    room.patch("ModelDeployment", "chat", {"spec": {"replicas": 0}}, "scale")
    room.says("ModelDeployment", "chat", "ScaledToZero")
    room.gone("PodDisruptionBudget", "chat-server")


def test_deleted_children_come_back(room: Room) -> None:
    serving(room)
    before = (room.get("Deployment", "chat-server") or {})["metadata"]["uid"]
    room.delete("Deployment", "chat-server")
    room.delete("ConfigMap", "chat-desired")

    def probe() -> bool:
        made = room.get("Deployment", "chat-server")
        return bool(made and made["metadata"]["uid"] != before and room.get("ConfigMap", "chat-desired"))

    eventually(probe, lambda: room.get("Deployment", "chat-server"))


def test_somebody_elses_service_is_left_alone(room: Room) -> None:
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "chat-server"}}
    made = room.make({**theirs, "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}})
    room.ours("ModelDeployment", "chat", **SPEC)
    said = room.says("ModelDeployment", "chat", "NameConflict")
    assert said["status"] == "False"
    assert "Service chat-server exists" in said["message"]
    kept = room.get("Service", "chat-server") or {}
    assert kept["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_the_report_of_a_pod_that_is_gone_is_taken_out(room: Room) -> None:
    pod = serving(room)
    room.delete("Pod", "chat-a")
    eventually(
        lambda: not (room.get("ConfigMap", "chat-reports") or {}).get("data"),
        lambda: room.get("ConfigMap", "chat-reports"),
    )
    said = room.says("ModelDeployment", "chat", "ReplicasUnavailable")
    assert said["status"] == "False"
    assert pod["metadata"]["name"] == "chat-a"


def test_an_operator_that_starts_again_rolls_nothing(room: Room, operator: Operator) -> None:
    serving(room)
    before = (room.get("Deployment", "chat-server") or {})["metadata"]["resourceVersion"]
    seen = room.status("ModelDeployment", "chat")
    operator.kill()
    operator.start()
    room.patch("ModelDeployment", "chat", {"metadata": {"annotations": {"look": "again"}}, "spec": {"replicas": 1}})
    room.patch("ModelDeployment", "chat", {"spec": {"adapters": []}})
    eventually(lambda: not desired(room).get("adapters"), lambda: desired(room))
    assert (room.get("Deployment", "chat-server") or {})["metadata"]["resourceVersion"] == before
    assert room.status("ModelDeployment", "chat")["startTime"] == seen["startTime"]
