"""Builds what a MergeJob's plan looks at in one line: the job, its batch Job, its pod and how that ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.unit.operator.makers import DIGEST, SETTINGS, at, terminated
from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending
from trimtab_api.v1alpha1 import FineTuneJob, MergeJob
from trimtab_api.v1alpha1.status import Artifact
from trimtab_operator.mergejob import build
from trimtab_operator.mergejob.plan import Seen, resolve
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producers, Reference

OTHER_DIGEST = "sha256:" + "b" * 64
PREFIX = "s3://bucket/runs/ns/merged/m1"
RUNNING = {"phase": "Running", "containerStatuses": [{"name": "merge", "state": {"running": {"startedAt": at(-50)}}}]}


def trained(
    name: str, *, digest: str | None = DIGEST, base: str = OTHER_DIGEST, kind: str = "adapter", **spec: Any
) -> tuple[Reference, FineTuneJob]:
    """A FineTuneJob that ended with an artifact, or one that still runs when digest is None."""
    artifact = {
        "uri": f"s3://bucket/runs/ns/{name}/u-{name}/artifact",
        "digest": digest,
        "kind": kind,
        "rank": 8,
        "base": {"uri": "s3://bucket/runs/ns/base/u-base/artifact", "digest": base},
    }
    state = {"type": "Succeeded", "status": "True" if digest else "Unknown", "lastTransitionTime": at(-99)}
    state["reason"] = "Succeeded" if digest else "Running"
    document = {
        "metadata": {"name": name, "namespace": "ns", "uid": f"u-{name}"},
        "spec": {
            "method": "sft",
            "model": {"from": {"fineTuneJob": {"name": "base"}}},
            "dataset": {"train": [{"from": {"s3": {"uri": "s3://bucket/rows.jsonl"}}}]},
            **spec,
        },
        "status": {"conditions": [state], **({"artifact": artifact} if digest else {})},
    }
    return Reference("FineTuneJob", name), FineTuneJob.read(document)


@dataclass
class Story:
    """A MergeJob and what happened to it."""

    spec: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    producers: Producers = field(default_factory=lambda: dict([trained("harbour")]))
    children: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = SETTINGS

    def job(self) -> MergeJob:
        metadata = {"name": "merged", "namespace": "ns", "uid": "m1", "generation": 2, **self.metadata}
        spec = {"adapters": [{"from": {"fineTuneJob": {"name": "harbour"}}}], **self.spec}
        return MergeJob.read({"metadata": metadata, "spec": spec, **({"status": self.status} if self.status else {})})

    def seen(self) -> Seen:
        return Seen(self.job(), self.settings, self.producers, self.children, tuple(self.pods), tuple(self.warnings))

    def begun(self, number: int = 1, seconds: float = -60, **changes: Any) -> Story:
        """Everything was made for this attempt; its Job stands."""
        work = resolve(self.seen())
        assert isinstance(work, build.Work), work
        for made in [*build.objects(work), build.job(work, number)]:
            made["metadata"] |= {"creationTimestamp": at(seconds), "uid": f"child-{number}"}
            self.children[made["kind"], made["metadata"]["name"]] = made
        attempts = [*self.status.get("attempts", []), {"number": number, "startTime": at(seconds)}]
        resolved = {"image": work.image, "outputUri": PREFIX}
        self.status = {**self.status, "attempt": number, "attempts": attempts, "resolved": resolved, **changes}
        return self

    @property
    def work(self) -> dict[str, Any]:
        return self.children["Job", "merged-merge"]

    def pod(self, **status: Any) -> Story:
        """The pod of the standing Job."""
        number = int(self.work["metadata"]["labels"][names.ATTEMPT])
        labels = names.labels("MergeJob", "merged", "m1", "merge", number)
        name = f"merged-merge-{number}x"
        meta = {"name": name, "namespace": "ns", "uid": f"p{number}", "labels": labels, "creationTimestamp": at(-50)}
        self.pods = [{"metadata": meta, "spec": {}, "status": status}]
        return self

    def ended(self, code: int, ending: Ending | None = None, **more: Any) -> Story:
        return self.pod(**terminated("merge", code, ending, **more))

    def reported(self, shard: int, of: int, seconds: float = -5) -> Story:
        """The pod wrote its progress."""
        told = {"shard": shard, "totalShards": of, "shards": f"{shard}/{of}", "updatedTime": at(seconds)}
        report = self.children["ConfigMap", "merged-merge-report"]
        report["data"] = {"progress.json": json.dumps({"attempt": 0, "merge": told})}
        return self


def published(uri: str = f"{PREFIX}/artifact", kind: Any = "model") -> Ending:
    return Ending(reason=Reason.SUCCEEDED, artifact=Artifact(uri=uri, digest=DIGEST, kind=kind))


def said(reason: Reason) -> Ending:
    return Ending(reason=reason, message="what happened.", hint="What to do.")
