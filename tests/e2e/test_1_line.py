"""The main job on a real node: YAML → tuned → merged → answering. The tests run in the order of a user's day."""

from __future__ import annotations

import time

import pytest

from demo import ask
from tests.e2e.workspace import Workspace, eventually, kill_processes
from tests.matrix import proves

CHAT = "chat-server"


def served(work: Workspace, service: str = CHAT) -> list[str]:
    with ask.client(work.cluster, work.namespace, service) as openai:
        return [model.id for model in openai.models.list()]


def test_adapters_wait_for_their_base_and_say_so(line: Workspace) -> None:
    condition = line.until_reason("finetunejob", "swift", "Waiting", 30)
    assert condition["status"] == "Unknown"
    assert "base" in condition["message"]


@proves("pretrain", "full", "pods")
def test_the_base_is_trained_from_nothing(line: Workspace) -> None:
    job = line.until_true("finetunejob", "base", 240)
    artifact = job["status"]["artifact"]
    assert artifact["kind"] == "model"
    assert artifact["digest"].startswith("sha256:")
    assert job["status"]["progress"]["steps"] == "240/240"
    assert [attempt["number"] for attempt in job["status"]["attempts"]] == [1]
    assert job["spec"]["training"]["learningRate"] == 0.002


@proves("sft", "lora", "nodes", "ddp", "pods")
def test_two_adapters_are_tuned_one_of_them_on_two_nodes(line: Workspace) -> None:
    base = line.get("finetunejob", "base")["status"]["artifact"]
    for name in ("swift", "harbour"):
        artifact = line.until_true("finetunejob", name, 240)["status"]["artifact"]
        assert artifact["kind"] == "adapter"
        assert artifact["rank"] == 8
        assert artifact["base"]["digest"] == base["digest"]
    pytorchjob = line.get("pytorchjob", "harbour-1")
    assert pytorchjob["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1


def test_an_adapter_is_merged(line: Workspace) -> None:
    artifact = line.until_true("mergejob", "merged", 120)["status"]["artifact"]
    assert artifact["kind"] == "model"


def test_every_name_answers_differently_and_the_merged_one_as_harbour(line: Workspace) -> None:
    line.until_true("modeldeployment", "chat", 240)
    line.until_true("modeldeployment", "merged-chat", 240)
    with ask.client(line.cluster, line.namespace, CHAT) as openai:
        assert [model.id for model in openai.models.list()] == ["base", "swift", "harbour"]
        answers = {name: ask.answer(openai, name) for name in ("base", "swift")}
        pieces = list(ask.stream(openai, "harbour"))
    assert len(pieces) > 3, "not streamed token by token"
    answers["harbour"] = "".join(pieces)
    assert "Swift" in answers["swift"]
    assert "Harbour" in answers["harbour"]
    assert len(set(answers.values())) == 3
    with ask.client(line.cluster, line.namespace, "merged-chat-server") as openai:
        assert ask.answer(openai, "merged") == answers["harbour"]


def test_an_adapter_comes_and_goes_without_a_restart(line: Workspace) -> None:
    adapters = line.get("modeldeployment", "chat")["spec"]["adapters"]
    before = pod_starts(line)
    line.patch("modeldeployment", "chat", {"adapters": [a for a in adapters if a["name"] != "swift"]})
    eventually(lambda: served(line) == ["base", "harbour"], 30, lambda: f"served: {served(line)}")
    line.patch("modeldeployment", "chat", {"adapters": adapters})
    started = time.monotonic()
    eventually(lambda: "swift" in served(line), 30, lambda: f"served: {served(line)}")
    assert time.monotonic() - started < 10
    assert pod_starts(line) == before


def test_a_killed_engine_comes_back_with_its_adapters(line: Workspace) -> None:
    line.until_true("modeldeployment", "chat", 120)
    if not kill_processes("chat-server-", "vllm"):
        pytest.skip("the engine runs on another computer")
    eventually(
        lambda: line.condition("modeldeployment", "chat").get("status") != "True" or None,
        60,
        "the loss was not noticed",
    )
    line.until_true("modeldeployment", "chat", 180)
    with ask.client(line.cluster, line.namespace, CHAT) as openai:
        assert "Swift" in ask.answer(openai, "swift")
        assert "Harbour" in ask.answer(openai, "harbour")


def pod_starts(work: Workspace) -> dict[str, list[str]]:
    """Start of every container of the chat deployment, by pod UID."""
    pods = work.find("pods", "-l", "trimtab.dev/name=chat")
    return {
        pod["metadata"]["uid"]: sorted(
            status["state"].get("running", {}).get("startedAt", "")
            for kind in ("containerStatuses", "initContainerStatuses")
            for status in pod["status"].get(kind, [])
        )
        for pod in pods
    }
