"""Builds what plan looks at in one line: a job, its pods, their endings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, Exit, RunConfig
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.status import Artifact
from trimtab_operator.finetunejob import build
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.plan import Plan
from trimtab_operator.settings import Settings

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
SETTINGS = Settings.model_validate(
    {
        "images": {"trainer": "registry/trainer@sha256:1", "server": "registry/server@sha256:1"},
        "storage": {"endpoint": "http://s3:9000", "credentials": {"secretName": "keys"}},
        "output": "s3://bucket/runs",
    }
)


def at(seconds: float) -> str:
    """A moment this many seconds from now."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def pod(role: str, name: str, attempt: int | None = None, uid: str = "u1", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "creationTimestamp": at(-60),
            "labels": names.labels("FineTuneJob", "job", uid, role, attempt),
            "finalizers": [names.EVIDENCE_FINALIZER],
        },
        "spec": {"volumes": [{"name": "c", "projected": {"sources": [{"secret": {"name": "keys"}}]}}]},
        "status": status,
    }


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": name, "state": state}]}


def terminated(name: str, code: int, ending: Ending | None = None, seconds: float = -1, **more: Any) -> dict[str, Any]:
    told = {"exitCode": code, "finishedAt": at(seconds), **more}
    if ending is not None:
        told["message"] = ending.text()
    return {"phase": "Succeeded" if code == 0 else "Failed", **container(name, terminated=told)}


RUNNING = {"phase": "Running", **container(build.CONTAINER, running={"startedAt": at(-50)})}


@dataclass
class Story:
    """A FineTuneJob and what happened to it."""

    spec: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    deleted: bool = False
    preflight: dict[str, Any] | None = None
    preflight_pods: list[dict[str, Any]] = field(default_factory=list)
    gang: dict[str, Any] | None = None
    pods: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    needless: list[dict[str, Any]] = field(default_factory=list)
    missing: set[tuple[str, str]] = field(default_factory=set)

    def attempt(self, number: int, seconds: float = -60, **changes: Any) -> Story:
        """An attempt that was made; open unless an endTime is given."""
        self.begun(number, seconds, uid=f"g{number}", **changes)
        meta = {"name": f"job-{number}", "namespace": "ns", "uid": f"g{number}"}
        self.gang = {"kind": "PyTorchJob", "metadata": meta, "spec": {}}
        return self

    def begun(self, number: int, seconds: float = -60, **changes: Any) -> Story:
        """An attempt that stands in status."""
        attempts = [*self.status.get("attempts", []), {"number": number, "startTime": at(seconds), **changes}]
        self.status |= {"attempt": number, "attempts": attempts}
        self.status.setdefault("startTime", at(seconds))
        return self

    def failed(self) -> Story:
        """training-operator has seen the gang fail."""
        assert self.gang is not None
        self.gang["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
        return self

    def runs(self, *statuses: dict[str, Any], seconds: float = -60) -> Story:
        """The open attempt's pods with these statuses, the master first; they were made so many seconds ago."""
        for index, status in enumerate(statuses):
            name = f"job-{self.status['attempt']}-" + ("master-0" if index == 0 else f"worker-{index - 1}")
            made = pod("trainer", name, self.status["attempt"], **status)
            made["metadata"]["creationTimestamp"] = at(seconds)
            if status["phase"] == "Running":
                made["spec"]["nodeName"] = "node"
            self.pods.append(made)
        return self

    def checked(self, code: int, ending: Ending, hashed: str | None = None, ago: float = 1) -> Story:
        """The preflight ended so many seconds ago."""
        self.checking(hashed)
        self.preflight_pods = [pod("preflight", "job-preflight-x", **terminated("preflight", code, ending, -ago))]
        return self

    def checking(self, hashed: str | None = None) -> Story:
        meta: dict[str, Any] = {"name": "job-preflight", "namespace": "ns", "uid": "p1", "creationTimestamp": at(-5)}
        meta |= {"annotations": {names.SPEC_HASH: hashed or self.hash()}}
        self.preflight = {"metadata": meta, "status": {}}
        return self

    def hash(self) -> str:
        config = build.run_config(self.job(), SETTINGS, {}, 1, SETTINGS.images.trainer)
        assert isinstance(config, RunConfig)
        return build.inputs_hash(config, self.status.get("failures", 0))

    def job(self) -> FineTuneJob:
        spec = {
            "method": "sft",
            "model": {"from": {"s3": {"uri": "s3://bucket/base"}}},
            "dataset": {"train": [{"from": {"s3": {"uri": "s3://bucket/rows.jsonl"}}}]},
        }
        metadata = {"name": "job", "namespace": "ns", "uid": "u1", "generation": 3}
        if self.deleted:
            metadata["deletionTimestamp"] = at(-1)
        document = {"metadata": metadata, "spec": {**spec, **self.spec}}
        if self.status:
            document["status"] = self.status
        return FineTuneJob.read(document)

    def seen(self) -> Seen:
        return Seen(
            job=self.job(),
            settings=SETTINGS,
            preflight=self.preflight,
            preflight_pods=tuple(self.preflight_pods),
            gang=self.gang,
            pods=tuple(self.pods),
            missing=frozenset(self.missing),
            events=tuple(self.events),
            needless=tuple(self.needless),
        )


def published(step: int = 9) -> Ending:
    artifact = Artifact(uri="s3://bucket/runs/ns/job/u1/artifact", digest=DIGEST, kind="adapter", rank=8)
    return Ending(reason=Reason.SUCCEEDED, step=step, artifact=artifact)


def leading(plan: Plan) -> tuple[str, str]:
    """Status and reason of the condition that leads."""
    assert plan.status is not None, "the plan writes no status"
    condition = next(each for each in plan.status["conditions"] if each["type"] == "Succeeded")
    return condition["status"], condition["reason"]


def message(plan: Plan) -> str:
    assert plan.status is not None
    return str(next(each for each in plan.status["conditions"] if each["type"] == "Succeeded")["message"])


def kinds(plan: Plan) -> list[str]:
    return [made["kind"] for made in plan.create]


def text(document: Any) -> str:
    return json.dumps(document, sort_keys=True)


__all__ = ["Exit", "Reason"]
