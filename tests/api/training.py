"""A stage for FineTuneJobs: the test plays the job controller, training-operator and the kubelet."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.api.stage import DIGEST, FINE_TUNE_JOB, Object, Stage, eventually, now

KIND = "FineTuneJob"


@dataclass
class Training(Stage):
    """A namespace of FineTuneJobs."""

    checked: set[str] = field(default_factory=set)
    """Preflight Jobs that were played."""

    # ------------------------------------------------------------ the user

    def apply(self, name: str, **spec: Any) -> Object:
        """A small sft job; keyword arguments replace parts of its spec."""
        return self.ours(KIND, name, **{**FINE_TUNE_JOB, **spec})

    def told(self, name: str) -> Object:
        """The job's status."""
        return self.status(KIND, name)

    def until(self, name: str, reason: str, deadline: float = 20.0) -> Object:
        """The leading condition of the job, once it has this reason."""
        return self.until_says(KIND, name, reason, deadline)

    # ------------------------------------------------------------ the cluster's other parts

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

    def gang(self, name: str, attempt: int = 1, deadline: float = 20.0, node: str | None = None) -> list[Object]:
        """The pods of an attempt, running. On a node they leave with grace, and stay until the kubelet confirms it."""
        job = self.until_there("PyTorchJob", f"{name}-{attempt}", deadline)
        pods = []
        for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
            for number in range(replica.get("replicas", 1)):
                template = replica["template"]
                placed = {**template, "spec": {**template["spec"], **({"nodeName": node} if node else {})}}
                pods.append(self.pod_of(job, f"{name}-{attempt}-{kind.lower()}-{number}", placed))
        for pod in pods:
            self.run(pod)
        return pods

    def suspend(self, name: str, held: bool) -> None:
        """A queue holds a PyTorchJob, or lets it run, and training-operator says so."""
        self.patch("PyTorchJob", name, {"spec": {"runPolicy": {"suspend": held}}})
        told = {"type": "Suspended", "status": str(held), "lastTransitionTime": now(), "reason": "PyTorchJobSuspended"}
        self.patch("PyTorchJob", name, {"status": {"conditions": [told]}}, "status")

    def run(self, pod: Object) -> None:
        self._container(pod, "Running", {"running": {"startedAt": now()}})

    def end(self, pod: Object, code: int, ending: Object | None = None) -> None:
        """The pod's process ends; of a pod that was told to leave, the kubelet confirms that by deleting it again."""
        state = {"exitCode": code, "finishedAt": now(), "startedAt": now(), "reason": "Error" if code else "Completed"}
        if ending is not None:
            state["message"] = json.dumps(ending)
        self._container(pod, "Failed" if code else "Succeeded", {"terminated": state})
        name = pod["metadata"]["name"]
        if "deletionTimestamp" in (self.get("Pod", name) or pod)["metadata"]:
            self.api.request("DELETE", self.path("Pod", name), {"gracePeriodSeconds": 0})

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
