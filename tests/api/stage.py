"""A stage for the operator: its process with the chart's rights, and the parts of job controller, training-operator and
kubelet, which a control plane without nodes leaves to the test."""

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
from tests.api.conftest import Api

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


def eventually(probe: Callable[[], T | None], what: str, deadline: float = 20.0) -> T:
    """What the probe finds; AssertionError when it finds nothing in time."""
    until = time.monotonic() + deadline
    while True:
        found = probe()
        if found:
            return found
        assert time.monotonic() < until, f"not within {deadline} s: {what}"
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


PATHS = {
    "Pod": "/api/v1/namespaces/{}/pods",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Event": "/api/v1/namespaces/{}/events",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "PyTorchJob": "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "FineTuneJob": "/apis/trimtab.dev/v1alpha1/namespaces/{}/finetunejobs",
    "MergeJob": "/apis/trimtab.dev/v1alpha1/namespaces/{}/mergejobs",
    "ModelDeployment": "/apis/trimtab.dev/v1alpha1/namespaces/{}/modeldeployments",
}


@dataclass
class Stage:
    """One namespace, seen by its user and by the cluster's other parts."""

    api: Api
    namespace: str
    checked: set[str] = field(default_factory=set)
    """Preflight Jobs that were played."""

    # ------------------------------------------------------------ objects

    def get(self, kind: str, name: str) -> Object | None:
        answer = self.api.request("GET", f"{PATHS[kind].format(self.namespace)}/{name}")
        return answer.body if answer.accepted else None

    def items(self, kind: str, labels: str = "") -> list[Object]:
        answer = self.api.request("GET", PATHS[kind].format(self.namespace), labelSelector=labels)
        assert answer.accepted, answer.message
        found: list[Object] = answer.body["items"]
        return found

    def make(self, made: Object, **query: str) -> Object:
        body = {**made, "metadata": {"namespace": self.namespace, **made["metadata"]}}
        answer = self.api.request("POST", PATHS[made["kind"]].format(self.namespace), body, **query)
        assert answer.accepted, answer.message
        return answer.body

    def patch(self, kind: str, name: str, body: Any, subresource: str = "") -> Object:
        path = f"{PATHS[kind].format(self.namespace)}/{name}" + (f"/{subresource}" if subresource else "")
        answer = self.api.request("PATCH", path, body, kind="application/merge-patch+json")
        assert answer.accepted, answer.message
        return answer.body

    def delete(self, kind: str, name: str, **options: Any) -> None:
        answer = self.api.request("DELETE", f"{PATHS[kind].format(self.namespace)}/{name}", options or None)
        assert answer.accepted, answer.message

    # ------------------------------------------------------------ the user

    def apply(self, name: str, **spec: Any) -> Object:
        """A small sft job; keyword arguments replace parts of its spec."""
        return self.make(finetunejob(name, **spec), fieldValidation="Strict")

    def status(self, name: str, kind: str = "FineTuneJob") -> Object:
        return (self.get(kind, name) or {}).get("status") or {}

    def verdict(self, name: str, kind: str = "FineTuneJob") -> Object:
        conditions = self.status(name, kind).get("conditions") or []
        return next((each for each in conditions if each["type"] in ("Succeeded", "Ready")), {})

    def until(self, name: str, reason: str, deadline: float = 20.0, kind: str = "FineTuneJob") -> Object:
        """The leading condition, once it has this reason."""

        def probe() -> Object | None:
            found = self.verdict(name, kind)
            return found if found.get("reason") == reason else None

        try:
            return eventually(probe, f"{name} says {reason}", deadline)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {self.verdict(name, kind)}") from None

    def until_there(self, kind: str, name: str, deadline: float = 20.0) -> Object:
        return eventually(lambda: self.get(kind, name), f"{kind} {name} exists", deadline)

    def until_gone(self, kind: str, name: str, deadline: float = 20.0) -> None:
        eventually(lambda: self.get(kind, name) is None, f"{kind} {name} is gone", deadline)

    # ------------------------------------------------------------ the cluster's other parts

    def pod_of(self, owner: Object, name: str, template: Object) -> Object:
        """A pod as a controller makes it."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")} | {
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
        }
        meta = {**template["metadata"], "name": name, "ownerReferences": [reference]}
        spec = {"restartPolicy": "Never", **template["spec"]}
        return self.make({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    def check(self, name: str, ending: Object | None = None, code: int = 0, deadline: float = 20.0) -> None:
        """The preflight's pod runs and ends."""

        def fresh() -> Object | None:
            job = self.get("Job", f"{name}-preflight")
            if job is None or job["metadata"].get("deletionTimestamp"):
                return None
            return None if job["metadata"]["uid"] in self.checked else job

        job = eventually(fresh, f"a new preflight of {name}", deadline)
        self.checked.add(job["metadata"]["uid"])
        pod = self.pod_of(job, _pod_name(job), job["spec"]["template"])
        self.end(pod, code, ending or {"reason": "InputsSound", "message": "4 rows are sound", "rows": 4})

    def gang(self, name: str, attempt: int = 1, deadline: float = 20.0) -> list[Object]:
        """The pods of an attempt, running."""
        job = self.until_there("PyTorchJob", f"{name}-{attempt}", deadline)
        pods = []
        for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
            for number in range(replica.get("replicas", 1)):
                pods.append(self.pod_of(job, f"{name}-{attempt}-{kind.lower()}-{number}", replica["template"]))
        for pod in pods:
            self.run(pod)
        return pods

    def run(self, pod: Object) -> None:
        self._container(pod, "Running", {"running": {"startedAt": now()}})

    def end(self, pod: Object, code: int, ending: Object | None = None) -> None:
        state = {"exitCode": code, "finishedAt": now(), "startedAt": now(), "reason": "Error" if code else "Completed"}
        if ending is not None:
            state["message"] = json.dumps(ending)
        self._container(pod, "Failed" if code else "Succeeded", {"terminated": state})

    def succeed(self, pod: Object, uri: str, step: int = 10) -> None:
        artifact = {"uri": uri, "digest": DIGEST, "kind": "adapter"}
        self.end(pod, 0, {"reason": "Succeeded", "step": step, "artifact": artifact})

    def report(self, name: str, attempt: int, step: int, total: int = 10, **progress: Any) -> None:
        """Rank 0 says how far it is."""
        told = {"step": step, "totalSteps": total, "steps": f"{step}/{total}", "updatedTime": now(), **progress}
        text = json.dumps({"attempt": attempt, "fromStep": 0, "progress": told})
        self.patch("ConfigMap", f"{name}-progress", {"data": {"progress.json": text}})

    def _container(self, pod: Object, phase: str, state: Object) -> None:
        container = pod["spec"]["containers"][0]
        status = {
            "name": container["name"], "image": container["image"], "imageID": "", "ready": False, "restartCount": 0,
            "state": state,
        }  # fmt: skip
        self.patch(
            "Pod", pod["metadata"]["name"], {"status": {"phase": phase, "containerStatuses": [status]}}, "status"
        )


def _pod_name(job: Object) -> str:
    return f"{job['metadata']['name']}-{job['metadata']['uid'][:5]}"


def finetunejob(name: str, **spec: Any) -> Object:
    """A small sft job; keyword arguments replace parts of its spec."""
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "method": "sft",
            "model": {"from": {"s3": {"uri": "s3://models/llama"}}},
            "dataset": {"train": [{"from": {"s3": {"uri": "s3://data/rows.jsonl"}}}]},
            **spec,
        },
    }
