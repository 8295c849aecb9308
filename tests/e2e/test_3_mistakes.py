"""Mistakes that only the cluster can find: a sentence within 30 s, nothing held, and mending the cause is enough."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from demo.cluster import Cluster
from demo.install import SECRET
from tests.e2e.workspace import Workspace, example, s3, workspace_named

KNOWABLE = 45
"""30 s from when it is knowable, and a pod's start before that."""


@pytest.fixture(scope="module")
def work(cluster: Cluster) -> Iterator[Workspace]:
    made = workspace_named(cluster, "e2e-mistakes")
    yield made
    made.remove()


def scratch(name: str, rows: str | None = None, uri: str | None = None) -> dict[str, Any]:
    """A small job from random weights on the rows given."""
    document = example("base")
    document["metadata"]["name"] = name
    document["spec"]["method"] = "sft"
    source = {"inline": rows} if rows is not None else {"s3": {"uri": uri}}
    document["spec"]["dataset"]["train"] = [{"from": source}]
    document["spec"]["training"].update({"maxSteps": 4})
    return document


GOOD = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]})
    for n in range(40)
)
BROKEN = GOOD + "\n" + json.dumps({"messages": [{"role": "user", "content": "and now?"}]})


def test_a_missing_object_is_named_and_its_arrival_is_enough(work: Workspace) -> None:
    key = f"late/{uuid.uuid4().hex}.jsonl"
    work.apply(scratch("absent", uri=f"s3://trimtab/{key}"))
    condition = work.until_reason("finetunejob", "absent", "ObjectMissing", KNOWABLE)
    assert f"s3://trimtab/{key}" in condition["message"]
    assert not work.find("pytorchjobs", "-l", "trimtab.dev/name=absent")
    s3(work.cluster).put_object(Bucket="trimtab", Key=key, Body=GOOD.encode())
    work.until_true("finetunejob", "absent", 180)


def test_a_missing_bucket_is_named_and_the_spec_may_be_mended(work: Workspace) -> None:
    work.apply(scratch("nobucket", uri="s3://no-such-bucket/rows.jsonl"))
    condition = work.until_reason("finetunejob", "nobucket", "BucketMissing", KNOWABLE)
    assert "no-such-bucket" in condition["message"]
    work.apply(scratch("nobucket", rows=GOOD))
    work.until_true("finetunejob", "nobucket", 120)


def test_a_broken_row_is_named_by_its_number(work: Workspace) -> None:
    work.apply(scratch("broken", rows=BROKEN))
    condition = work.until_reason("finetunejob", "broken", "DataInvalid", KNOWABLE)
    assert "dataset.train[0]" in condition["message"]
    assert "41" in condition["message"]
    assert condition["status"] == "Unknown"


def test_an_empty_data_set_is_told(work: Workspace) -> None:
    s3(work.cluster).put_object(Bucket="trimtab", Key="empty/rows.jsonl", Body=b"")
    work.apply(scratch("empty", uri="s3://trimtab/empty/rows.jsonl"))
    work.until_reason("finetunejob", "empty", "DataEmpty", KNOWABLE)


def test_wrong_and_missing_credentials_are_told_apart_and_mended(work: Workspace) -> None:
    wrong = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    for name, keys in (("wrong", wrong), ("partial", {"AWS_ACCESS_KEY_ID": "nobody"})):
        data = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
        work.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data})
    for name, secret in (("denied", "wrong"), ("keyless", "partial"), ("secretless", "not-there")):
        document = scratch(name, uri="s3://trimtab/data/base.jsonl")
        document["spec"]["storage"] = {"credentials": {"secretName": secret}}
        work.apply(document)
    work.until_reason("finetunejob", "denied", "CredentialsWrong", KNOWABLE)
    for name, secret in (("keyless", "partial"), ("secretless", "not-there")):
        condition = work.until_reason("finetunejob", name, "CredentialsMissing", KNOWABLE)
        assert secret in condition["message"]
    right = work.get("secret", SECRET)["data"]
    work.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "not-there"}, "data": right})
    work.until_true("finetunejob", "secretless", 180)


def test_conversations_without_a_chat_template_are_told(work: Workspace, line: Workspace) -> None:
    base = line.until_true("finetunejob", "base", 240)["status"]["artifact"]
    bucket, _, prefix = base["uri"].removeprefix("s3://").partition("/")
    client = s3(work.cluster)
    for file in line.manifest(base["uri"])["files"]:
        body = client.get_object(Bucket=bucket, Key=f"{prefix}/{file['path']}")["Body"].read()
        if file["path"].endswith("chat_template.jinja"):
            continue
        if file["path"] == "tokenizer_config.json":
            settings = json.loads(body)
            settings.pop("chat_template", None)
            body = json.dumps(settings).encode()
        client.put_object(Bucket="trimtab", Key=f"bare/{file['path']}", Body=body)
    document = example("swift")
    document["metadata"]["name"] = "bare"
    document["spec"]["model"] = {"from": {"s3": {"uri": "s3://trimtab/bare"}}}
    work.apply(document)
    work.until_reason("finetunejob", "bare", "ChatTemplateMissing", KNOWABLE)


def test_a_base_of_another_kind_is_refused(work: Workspace, line: Workspace) -> None:
    adapter = line.until_true("finetunejob", "swift", 240)["status"]["artifact"]
    other = work.until_true("finetunejob", "nobucket", 180)["status"]["artifact"]
    work.apply(
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "MergeJob",
            "metadata": {"name": "mismatch"},
            "spec": {
                "adapters": [{"from": {"s3": {"uri": adapter["uri"]}}}],
                "base": {"s3": {"uri": other["uri"]}},
            },
        }
    )
    condition = work.until_reason("mergejob", "mismatch", "BaseMismatch", 2 * KNOWABLE)
    assert other["digest"][7:19] in condition["message"] or "base" in condition["message"]


def test_a_foreign_object_is_left_alone(work: Workspace) -> None:
    work.kubectl("create", "configmap", "taken-progress", "--from-literal=whose=mine")
    work.apply(scratch("taken", rows=GOOD))
    condition = work.until_reason("finetunejob", "taken", "NameConflict", KNOWABLE)
    assert "taken-progress" in condition["message"]
    assert work.get("configmap", "taken-progress")["data"] == {"whose": "mine"}
    work.kubectl("delete", "configmap", "taken-progress")
    work.until_true("finetunejob", "taken", 180)


def test_too_large_a_pod_is_unschedulable_and_says_so(work: Workspace) -> None:
    document = scratch("huge", rows=GOOD)
    document["spec"]["pod"] = {"resources": {"requests": {"cpu": "500", "memory": "1Gi"}}}
    work.apply(document)
    condition = work.until_reason("finetunejob", "huge", "Unschedulable", 120)
    assert "cpu" in condition["message"].lower()
