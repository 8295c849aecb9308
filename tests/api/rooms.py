"""The operator as a process under the chart's rights, and the parts of kubelet and controllers that a test plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from lab import ports
from tests.api.conftest import Api

ROOT = Path(__file__).resolve().parents[2]
Object = dict[str, Any]
T = TypeVar("T")

DIGEST = "sha256:" + "a" * 64
SETTINGS: Object = {
    "images": {"trainer": "registry.test/trainer:1", "server": "registry.test/server:1"},
    "storage": {"endpoint": "http://s3.test:9000", "pathStyle": True, "credentials": {"secretName": "s3"}},
    "output": "s3://results/runs",
}
GROUPS = {
    "Pod": "/api/v1", "ConfigMap": "/api/v1", "Service": "/api/v1", "ServiceAccount": "/api/v1",
    "Job": "/apis/batch/v1", "Deployment": "/apis/apps/v1",
    "Role": "/apis/rbac.authorization.k8s.io/v1", "RoleBinding": "/apis/rbac.authorization.k8s.io/v1",
    "NetworkPolicy": "/apis/networking.k8s.io/v1", "PodDisruptionBudget": "/apis/policy/v1",
    "FineTuneJob": "/apis/trimtab.dev/v1alpha1", "MergeJob": "/apis/trimtab.dev/v1alpha1",
    "ModelDeployment": "/apis/trimtab.dev/v1alpha1",
}  # fmt: skip
PLURALS = {"NetworkPolicy": "networkpolicies"}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def eventually(probe: Callable[[], T | None], what: Callable[[], Any], seconds: float = 20.0) -> T:
    """What the probe finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.05)


@dataclass
class Operator:
    """The process; it can be killed and started again."""

    kubeconfig: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = self.folder / "settings.json"
        settings.write_text(json.dumps(SETTINGS))
        health, metrics = ports.free(2)
        search = os.pathsep.join(str(ROOT / each) for each in ("core", "operator"))
        with (self.folder / "operator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "trimtab_operator.main", "--settings", str(settings),
                    "--health-port", str(health), "--metrics-port", str(metrics),
                ],
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": search},
                stdout=log,
                stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """As a node that loses power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def log(self) -> str:
        return (self.folder / "operator.log").read_text()


@dataclass
class Room:
    """One namespace, seen by its user and by the cluster's other parts."""

    api: Api
    namespace: str

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        plural = PLURALS.get(kind, kind.lower() + "s")
        return "/".join(filter(None, [f"{GROUPS[kind]}/namespaces/{self.namespace}/{plural}", name, subresource]))

    def get(self, kind: str, name: str) -> Object | None:
        answer = self.api.request("GET", self.path(kind, name))
        return answer.body if answer.accepted else None

    def there(self, kind: str, name: str, seconds: float = 20.0) -> Object:
        return eventually(lambda: self.get(kind, name), lambda: f"{kind} {name} exists", seconds)

    def gone(self, kind: str, name: str, seconds: float = 20.0) -> None:
        eventually(lambda: self.get(kind, name) is None, lambda: self.get(kind, name), seconds)

    def make(self, made: Object) -> Object:
        body = {**made, "metadata": {"namespace": self.namespace, **made["metadata"]}}
        answer = self.api.request("POST", self.path(made["kind"]), body, fieldValidation="Strict")
        assert answer.accepted, answer.message
        return answer.body

    def ours(self, kind: str, name: str, **spec: Any) -> Object:
        """A resource of ours."""
        return self.make({"apiVersion": "trimtab.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})

    def patch(self, kind: str, name: str, body: Any, subresource: str = "") -> Object:
        answer = self.api.request(
            "PATCH", self.path(kind, name, subresource), body, kind="application/merge-patch+json"
        )
        assert answer.accepted, answer.message
        return answer.body

    def delete(self, kind: str, name: str) -> None:
        answer = self.api.request("DELETE", self.path(kind, name), {"propagationPolicy": "Background"})
        assert answer.accepted, answer.message

    def status(self, kind: str, name: str) -> Object:
        return (self.get(kind, name) or {}).get("status") or {}

    def leading(self, kind: str, name: str) -> Object:
        wanted = "Ready" if kind == "ModelDeployment" else "Succeeded"
        conditions = self.status(kind, name).get("conditions") or []
        return next((each for each in conditions if each["type"] == wanted), {})

    def says(self, kind: str, name: str, reason: str, seconds: float = 20.0) -> Object:
        """The leading condition, once it has this reason."""

        def probe() -> Object | None:
            found = self.leading(kind, name)
            return found if found.get("reason") == reason else None

        return eventually(probe, lambda: (reason, self.leading(kind, name)), seconds)

    def pod(self, owner: Object, name: str, **status: Any) -> Object:
        """A pod as a controller makes it and the kubelet reports it."""
        template = owner["spec"]["template"]
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        meta = {**template["metadata"], "name": name, "ownerReferences": [reference]}
        spec = {key: value for key, value in template["spec"].items() if key != "schedulerName"}
        self.make({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        return self.patch("Pod", name, {"status": status}, "status")

    def finished(self, name: str, kind: str = "adapter", **artifact: Any) -> None:
        """A FineTuneJob of this name ends with an artifact."""
        condition = {
            "type": "Succeeded", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": now()
        }  # fmt: skip
        made = {"uri": f"s3://results/{name}", "digest": DIGEST, "kind": kind, **artifact}
        told = {"conditions": [condition], "artifact": made, "completionTime": now()}
        self.patch("FineTuneJob", name, {"status": told}, "status")


FINE_TUNE_JOB: Object = {
    "method": "sft",
    "model": {"from": {"s3": {"uri": "s3://models/llama"}}},
    "dataset": {"train": [{"from": {"s3": {"uri": "s3://data/rows.jsonl"}}}]},
}
