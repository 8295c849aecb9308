"""A namespace of a test's own on a real cluster, and a way to wait that has a deadline and says what it saw last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import psutil
import yaml
from botocore.config import Config

from demo import install
from demo.cluster import ROOT, Cluster

T = TypeVar("T")
EXAMPLES = ROOT / "examples"
LEADING = {"finetunejob": "Succeeded", "mergejob": "Succeeded", "modeldeployment": "Ready"}


def eventually(check: Callable[[], T | None], seconds: float, what: Callable[[], str] | str) -> T:
    """The first answer of check that is neither None nor False; fails with what was seen when the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        seen = check()
        if seen is not None and seen is not False:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.3)


@dataclass(frozen=True)
class Workspace:
    """A namespace of a test's own, under the restricted Pod Security profile."""

    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 120) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, stdin=stdin, check=check, timeout=timeout)

    def apply(self, document: dict[str, Any] | Path) -> None:
        if isinstance(document, Path):
            self.kubectl("apply", "-f", str(document))
        else:
            self.kubectl("apply", "-f", "-", stdin=json.dumps(document))

    def remove(self) -> None:
        """Delete the namespace, the jobs first: it waits half of its pods' grace before it looks at them again."""
        self.kubectl("delete", "finetunejobs,mergejobs,modeldeployments", "--all", "--wait", timeout=180)
        self.cluster.kubectl("delete", "namespace", self.namespace, "--wait", timeout=240)

    def patch(self, kind: str, name: str, spec: dict[str, Any]) -> None:
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return self.cluster.get(kind, name, "-n", self.namespace)

    def find(self, kind: str, *selector: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.cluster.get(kind, "-n", self.namespace, *selector)["items"]
        return items

    def condition(self, kind: str, name: str) -> dict[str, Any]:
        status = self.get(kind, name).get("status", {})
        return next((c for c in status.get("conditions", []) if c["type"] == LEADING[kind]), {})

    def until_reason(self, kind: str, name: str, reason: str, seconds: float) -> dict[str, Any]:
        """Wait for the leading condition's reason; give the condition back."""

        def reached() -> dict[str, Any] | None:
            seen = self.condition(kind, name)
            return seen if seen.get("reason") == reason else None

        return eventually(reached, seconds, lambda: self.story(kind, name, f"wanted {reason}"))

    def until_true(self, kind: str, name: str, seconds: float) -> dict[str, Any]:
        """Wait until the leading condition is True, failing at once when it is False for good; give the object back."""

        def reached() -> dict[str, Any] | None:
            seen = self.condition(kind, name)
            if seen.get("status") == "False" and LEADING[kind] == "Succeeded":
                raise AssertionError(self.story(kind, name, "failed"))
            return self.get(kind, name) if seen.get("status") == "True" else None

        return eventually(reached, seconds, lambda: self.story(kind, name, "not True"))

    def until_step(self, name: str, step: int, seconds: float) -> int:
        def reached() -> int | None:
            progress = self.get("finetunejob", name).get("status", {}).get("progress") or {}
            now: int = progress.get("step", 0)
            return now if now >= step else None

        return eventually(reached, seconds, lambda: self.story("finetunejob", name, f"never reached step {step}"))

    def story(self, kind: str, name: str, headline: str) -> str:
        """What a person would look at: describe, pods, events, logs."""
        parts = [
            f"{kind} {name}: {headline}",
            self.kubectl("describe", kind, name, check=False),
            self.kubectl("get", "pods,jobs,pytorchjobs", "-o", "wide", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-4000:],
        ]
        for pod in self.find("pods", "-l", f"trimtab.dev/name={name}")[-4:]:
            label = pod["metadata"]["name"]
            log = self.kubectl("logs", label, "--all-containers", "--tail=25", check=False)
            parts.append(f"--- log of {label}\n{log}")
        return "\n".join(parts)

    def manifest(self, uri: str) -> dict[str, Any]:
        """The manifest of an artifact."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        body = s3(self.cluster).get_object(Bucket=bucket, Key=f"{key}/manifest.json")["Body"].read()
        document: dict[str, Any] = json.loads(body)
        return document

    def answers(self, uri: str) -> list[dict[str, Any]]:
        """The lines of predictions.jsonl below a prefix."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        body = s3(self.cluster).get_object(Bucket=bucket, Key=f"{key}/predictions.jsonl")["Body"].read()
        return [json.loads(line) for line in body.splitlines()]

    def objects(self, uri: str) -> set[str]:
        """The keys below a prefix."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        pages = s3(self.cluster).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/")
        return {each["Key"] for page in pages for each in page.get("Contents", [])}

    def weights(self, name: str) -> dict[str, str]:
        """sha256 of each weight file that a FineTuneJob made."""
        artifact = self.get("finetunejob", name)["status"]["artifact"]
        files = self.manifest(artifact["uri"])["files"]
        return {file["path"]: file["sha256"] for file in files if file["path"].endswith(".safetensors")}


def kill_processes(pod: str, program: str = "") -> bool:
    """SIGKILL what runs in the pods of this name or prefix on this computer; False when there is nothing."""
    killed = False
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        host = (process.info["environ"] or {}).get("HOSTNAME", "")
        if program in command and host.startswith(pod):
            process.kill()
            killed = True
    return killed


def s3(cluster: Cluster) -> Any:
    """A client of the cluster's object storage."""
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id=cluster.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.env["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )


def example(name: str, **changes: Any) -> dict[str, Any]:
    """A resource of the main example, with top-level keys of spec replaced."""
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / "who-are-you" / f"{name}.yaml").read_text())
    # PyYAML reads 2e-3 as text where kubectl reads a number.
    training = document["spec"].get("training", {})
    if isinstance(training.get("learningRate"), str):
        training["learningRate"] = float(training["learningRate"])
    document["spec"].update(changes)
    return document


def workspace_named(cluster: Cluster, name: str) -> Workspace:
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait", timeout=180)
    install.namespace(cluster, name)
    return Workspace(cluster, name)
