"""A stage for the operator: its process with the chart's rights, and a namespace in which a test plays the user, the
controllers and the kubelet, which a control plane without nodes leaves to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

from lab import ports
from tests.api.client import Answer, Api

ROOT = Path(__file__).resolve().parents[2]
Object = dict[str, Any]
T = TypeVar("T")

DIGEST = "sha256:" + "a" * 64
SETTINGS: Object = {
    "images": {"trainer": "registry.test/trainer:1", "server": "registry.test/server:1"},
    "storage": {"endpoint": "http://s3.test:9000", "pathStyle": True, "credentials": {"secretName": "s3"}},
    "output": "s3://results/runs",
    "workers": 4,
    "resyncSeconds": 300,
    "startTimeoutSeconds": 300,
    "logLevel": "info",
}


def eventually(probe: Callable[[], T | None], what: str | Callable[[], Any], deadline: float = 20.0) -> T:
    """What the probe finds; AssertionError when it finds nothing in time, with what there is instead."""
    until = time.monotonic() + deadline
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() >= until:
            raise AssertionError(f"not within {deadline} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class OperatorProcess:
    """The operator, started, killed and started again."""

    kubeconfig: Path
    folder: Path
    settings: Object = field(default_factory=lambda: dict(SETTINGS))
    module: str = "trimtab_operator.main"
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    health: int = 0
    metrics: int = 0

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        self.health, self.metrics = ports.free(2)
        search = os.pathsep.join(str(ROOT / each) for each in ("core", "operator", "."))
        with (self.folder / "operator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-W", "error", "-m", self.module, "--settings", str(self.folder / "settings.json"),
                    "--health-port", str(self.health), "--metrics-port", str(self.metrics),
                ],
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": search, **self.environment},
                stdout=log,
                stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """As a node that loses power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def stop(self) -> int:
        """As the kubelet does it; the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        return code

    def log(self) -> str:
        return (self.folder / "operator.log").read_text()

    def figures(self) -> str:
        with urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def healthy(self) -> bool:
        with urlopen(f"http://127.0.0.1:{self.health}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)


GROUPS = {
    "Pod": "/api/v1", "ConfigMap": "/api/v1", "Service": "/api/v1", "ServiceAccount": "/api/v1", "Event": "/api/v1",
    "Job": "/apis/batch/v1", "Deployment": "/apis/apps/v1", "PyTorchJob": "/apis/kubeflow.org/v1",
    "Role": "/apis/rbac.authorization.k8s.io/v1", "RoleBinding": "/apis/rbac.authorization.k8s.io/v1",
    "NetworkPolicy": "/apis/networking.k8s.io/v1", "PodDisruptionBudget": "/apis/policy/v1",
    "FineTuneJob": "/apis/trimtab.dev/v1alpha1", "MergeJob": "/apis/trimtab.dev/v1alpha1",
    "ModelDeployment": "/apis/trimtab.dev/v1alpha1",
}  # fmt: skip
PLURALS = {"NetworkPolicy": "networkpolicies"}
MERGE = "application/merge-patch+json"


@dataclass
class Stage:
    """One namespace, seen by its user and by the cluster's other parts."""

    api: Api
    namespace: str

    # ------------------------------------------------------------ objects

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        plural = PLURALS.get(kind, kind.lower() + "s")
        return "/".join(filter(None, [f"{GROUPS[kind]}/namespaces/{self.namespace}/{plural}", name, subresource]))

    def get(self, kind: str, name: str) -> Object | None:
        answer = self.api.request("GET", self.path(kind, name))
        return answer.body if answer.accepted else None

    def items(self, kind: str, labels: str = "") -> list[Object]:
        answer = self.api.request("GET", self.path(kind), labelSelector=labels)
        assert answer.accepted, answer.message
        found: list[Object] = answer.body["items"]
        return found

    def try_make(self, made: Object, **query: str) -> Answer:
        body = {**made, "metadata": {"namespace": self.namespace, **made["metadata"]}}
        return self.api.request("POST", self.path(made["kind"]), body, fieldValidation="Strict", **query)

    def make(self, made: Object) -> Object:
        answer = self.try_make(made)
        assert answer.accepted, answer.message
        return answer.body

    def try_patch(self, kind: str, name: str, body: Any, subresource: str = "") -> Answer:
        return self.api.request("PATCH", self.path(kind, name, subresource), body, kind=MERGE)

    def patch(self, kind: str, name: str, body: Any, subresource: str = "") -> Object:
        answer = self.try_patch(kind, name, body, subresource)
        assert answer.accepted, answer.message
        return answer.body

    def delete(self, kind: str, name: str) -> None:
        answer = self.api.request("DELETE", self.path(kind, name), {"propagationPolicy": "Background"})
        assert answer.accepted, answer.message

    def until_there(self, kind: str, name: str, deadline: float = 20.0) -> Object:
        return eventually(lambda: self.get(kind, name), f"{kind} {name} exists", deadline)

    def until_gone(self, kind: str, name: str, deadline: float = 20.0) -> None:
        eventually(lambda: self.get(kind, name) is None, lambda: self.get(kind, name), deadline)

    # ------------------------------------------------------------ resources of ours

    def ours(self, kind: str, name: str, **spec: Any) -> Object:
        """Apply a resource of ours."""
        return self.make({"apiVersion": "trimtab.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})

    def status(self, kind: str, name: str) -> Object:
        return (self.get(kind, name) or {}).get("status") or {}

    def leading(self, kind: str, name: str) -> Object:
        """The condition that leads."""
        conditions = self.status(kind, name).get("conditions") or []
        return next((each for each in conditions if each["type"] in ("Succeeded", "Ready")), {})

    def until_says(self, kind: str, name: str, reason: str, deadline: float = 20.0) -> Object:
        """The leading condition, once it has this reason."""

        def probe() -> Object | None:
            found = self.leading(kind, name)
            return found if found.get("reason") == reason else None

        return eventually(probe, lambda: f"{kind} {name} says {reason}: {self.leading(kind, name)}", deadline)

    def finished(self, name: str, kind: str = "adapter", **artifact: Any) -> None:
        """A FineTuneJob of this name ends with an artifact."""
        condition = {
            "type": "Succeeded", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": now()
        }  # fmt: skip
        made = {"uri": f"s3://results/{name}", "digest": DIGEST, "kind": kind, **artifact}
        told = {"conditions": [condition], "artifact": made, "completionTime": now()}
        self.patch("FineTuneJob", name, {"status": told}, "status")

    # ------------------------------------------------------------ the cluster's other parts

    def pod_of(self, owner: Object, name: str, template: Object, **status: Any) -> Object:
        """A pod as a controller makes it and the kubelet reports it."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")} | {
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        meta = {**template["metadata"], "name": name, "ownerReferences": [reference]}
        made = self.make({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})
        return self.patch("Pod", name, {"status": status}, "status") if status else made


FINE_TUNE_JOB: Object = {
    "method": "sft",
    "model": {"from": {"s3": {"uri": "s3://models/llama"}}},
    "dataset": {"train": [{"from": {"s3": {"uri": "s3://data/rows.jsonl"}}}]},
}
"""A small sft job."""
