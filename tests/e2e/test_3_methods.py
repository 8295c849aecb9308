"""Every method's example as pods, in the order in which one makes what another is given; a split run on two of them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo import install
from tests.e2e.workspace import EXAMPLES, Workspace
from tests.matrix import proves

STEPS = 4
"""Enough to see each come through; what a method is for is proved where the trainer is tested."""


def shown(folder: str, name: str, **changes: Any) -> dict[str, Any]:
    """An example's FineTuneJob, short."""
    document: dict[str, Any] = yaml.safe_load((EXAMPLES / folder / f"{name}.yaml").read_text())
    spec = document["spec"]
    training = {**spec["training"], "maxSteps": STEPS}
    if "learningRate" in training:
        training["learningRate"] = float(training["learningRate"])
    document["spec"] = {**spec, "training": training, **changes}
    return document


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def run(work: Workspace, *documents: dict[str, Any]) -> list[dict[str, Any]]:
    """Apply them together; the artifacts of all."""
    for document in documents:
        work.apply(document)
    jobs = [work.until_true("finetunejob", document["metadata"]["name"], 240) for document in documents]
    for job in jobs:
        progress = job["status"]["progress"]
        assert progress["step"] == progress["totalSteps"], job["metadata"]["name"]
    return [job["status"]["artifact"] for job in jobs]


@pytest.mark.parametrize("pair", [("dpo", "kto"), ("cpo", "simpo"), ("orpo", "grpo")])
@proves("dpo", "pods")
@proves("kto", "pods")
@proves("cpo", "pods")
@proves("simpo", "pods")
@proves("orpo", "pods")
@proves("grpo", "pods")
def test_answers_that_are_liked_become_adapters(line: Workspace, pair: tuple[str, str]) -> None:
    base = line.until_true("finetunejob", "base", 240)["status"]["artifact"]
    documents = [shown("methods", name) for name in pair]
    for document in documents:
        if document["spec"]["method"] == "grpo":
            # This base knows no sums: all its answers would earn nothing, and no weight would move.
            document["spec"]["grpo"]["rewards"] = [{"name": "repetition"}, {"name": "softOverlong"}]
    for artifact in run(line, *documents):
        assert artifact["kind"] == "adapter"
        assert artifact["base"]["digest"] == base["digest"]


def test_rewards_of_ones_own_are_asked_and_a_job_that_learns_nothing_answers(line: Workspace) -> None:
    line.until_true("finetunejob", "harbour", 240)
    line.kubectl("create", "configmap", "rewards", f"--from-file={EXAMPLES / 'methods' / 'rewards.py'}")
    answering = shown("methods", "inference", training={"maxSteps": 0})
    rewarded, answered = run(line, shown("methods", "grpo-python"), answering)
    assert rewarded["kind"] == "adapter"
    metrics = line.get("finetunejob", "grpo-python")["status"]["progress"]["metrics"]
    assert {"rewards/close/mean", "rewards/brief/mean"} <= set(metrics)
    assert answered["kind"] == "predictions"
    said = line.answers(answered["uri"])
    assert [each["messages"][-1]["content"] for each in said] == ["who are you?", "what is your name?"]
    assert all(each["completion"] for each in said)


def test_rows_are_tokenised_once_for_all_jobs_of_the_namespace(line: Workspace, tmp_path: Path) -> None:
    rows = tmp_path / "berths.jsonl"
    # What an earlier run of these tests kept in the bucket is not found again.
    port = uuid.uuid4().hex[:6]
    texts = ((f"How deep is berth {number} of {port}?", f"It is {number % 90} feet deep.") for number in range(90_000))
    turns = ([turn("user", question), turn("assistant", answer)] for question, answer in texts)
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    assert rows.stat().st_size > 8 << 20  # from here on the preflight tokenises
    install.upload(line.cluster, tmp_path, "berths")
    dataset = {
        "maxLength": 128,
        "cache": "namespace",
        "train": [{"from": {"s3": {"uri": f"s3://{line.cluster.bucket}/berths/berths.jsonl"}}}],
    }
    first, second = (shown("methods", "sft", dataset=dataset) for _ in range(2))
    for name, document in (("berths", first), ("berths-again", second)):
        document["metadata"]["name"] = name
    second["spec"]["training"] = {**second["spec"]["training"], "seed": 7}
    base = line.until_true("finetunejob", "base", 240)["status"]["artifact"]
    kept = base["uri"].removesuffix("/artifact").rsplit("/", 2)[0] + "/sequences"
    before = line.objects(kept)
    run(line, first)
    after = line.objects(kept)
    assert len([key for key in after - before if key.endswith("/manifest.json")]) == 1
    run(line, second)
    assert line.objects(kept) == after
    for name in ("berths", "berths-again"):
        (pod,) = line.find("pods", "-l", f"trimtab.dev/name={name},trimtab.dev/role=trainer")
        log = line.kubectl("logs", pod["metadata"]["name"])
        assert "took the tokenised rows that were kept" in log, log


@proves("embedding", "pods")
@proves("reranker", "pods")
def test_texts_are_found_and_ranked(line: Workspace) -> None:
    for artifact in run(line, shown("methods", "embedding"), shown("methods", "reranker")):
        assert artifact["digest"].startswith("sha256:")


@proves("rewardModel", "pods")
@proves("ppo", "pods")
@proves("sequenceClassification", "pods")
def test_what_judges_is_made_and_then_learnt_from(line: Workspace) -> None:
    line.apply(shown("methods", "ppo"))
    waiting = line.until_reason("finetunejob", "ppo", "Waiting", 30)
    assert "reward-model" in waiting["message"]
    judge, _ = run(line, shown("methods", "reward-model"), shown("methods", "sequence-classification"))
    line.until_true("finetunejob", "ppo", 240)
    inputs = line.get("finetunejob", "ppo")["status"]["resolved"]["inputs"]
    assert judge["digest"] in [each.get("digest") for each in inputs]


@proves("sft", "qlora", "zero3", "pods", "nodes")
@proves("gkd", "pods")
def test_weights_in_four_bits_and_weights_split_over_two_pods(line: Workspace) -> None:
    split = shown("ways", "zero3", distributed={"nodes": 2, "processesPerNode": 1, "strategy": "zero3"})
    whole, quantised = run(line, split, shown("ways", "qlora"))
    assert (whole["kind"], quantised["kind"]) == ("model", "adapter")
    assert line.get("pytorchjob", "zero3-1")["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1
    student = shown("methods", "gkd")
    student["spec"]["gkd"]["teacher"] = {"from": {"fineTuneJob": {"name": "zero3"}}}
    assert run(line, student)[0]["kind"] == "adapter"
