"""vLLM beside the trainer, in its pods: it draws from the weights of each step, and the attempt ends with it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.test_3_methods import STEPS, shown
from tests.e2e.workspace import Workspace, eventually, kill_processes


def asking(name: str, rate: float, **changes: Any) -> dict[str, Any]:
    """The example of a job with an engine, by another name."""
    document = shown("methods", "grpo-vllm", **changes)
    document["metadata"]["name"] = name
    # This base knows no sums: all its answers would earn nothing, and no weight would move.
    document["spec"]["grpo"]["rewards"] = [{"name": "repetition"}, {"name": "softOverlong"}]
    # Far enough for an answer of older weights to be another one's.
    document["spec"]["training"]["learningRate"] = rate
    return document


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tuner", "nodes"), [("full", 1), ("lora", 2)])
def test_an_engine_beside_the_trainer_draws_from_the_weights_as_they_are(
    line: Workspace, tuner: str, nodes: int
) -> None:
    line.until_true("finetunejob", "base", 240)
    name = f"grpo-vllm-{tuner}-{nodes}"
    rate = {"lora": 5e-3, "full": 1e-3}[tuner]
    line.apply(asking(name, rate, tuner={"type": tuner}, distributed={"nodes": nodes, "processesPerNode": 1}))
    # vLLM's start alone takes a minute on two cores.
    job = line.until_true("finetunejob", name, 480)
    assert job["status"]["artifact"]["kind"] == {"lora": "adapter", "full": "model"}[tuner]
    assert job["status"]["attempt"] == 1
    # vLLM's own count of what it drew, against a forward pass of the weights that are trained.
    metrics = job["status"]["progress"]["metrics"]
    assert metrics["sampling/sampling_logp_difference/max"] < 0.01
    pods = line.find("pods", "-l", f"trimtab.dev/name={name},trimtab.dev/role=trainer")
    for pod in pods:
        (engine,) = (each for each in pod["spec"]["initContainers"] if each["name"] == "rollout")
        assert engine["restartPolicy"] == "Always"
        if tuner == "lora" and pod["metadata"]["name"].endswith("master-0"):
            told = line.kubectl("logs", pod["metadata"]["name"], "-c", "rollout")
            assert [f"'step-{step}'" in told for step in range(STEPS + 1)] == [True] * STEPS + [False]


@pytest.mark.timeout(900)
def test_an_attempt_ends_with_its_engine_and_the_next_goes_on(line: Workspace) -> None:
    line.until_true("finetunejob", "base", 240)
    document = asking("grpo-vllm-dies", 1e-4)
    document["spec"]["training"]["maxSteps"] = 20
    line.apply(document)
    line.until_step("grpo-vllm-dies", 2, 300)
    assert kill_processes("grpo-vllm-dies-1-", "vllm.entrypoints")

    def told() -> str | None:
        attempts = line.get("finetunejob", "grpo-vllm-dies")["status"]["attempts"]
        found: str | None = attempts[0].get("reason")
        return found

    assert eventually(told, 120, "the first attempt does not end") == "EngineFailed"
    job = line.until_true("finetunejob", "grpo-vllm-dies", 300)
    assert job["status"]["attempt"] == 2
    assert job["status"]["progress"]["step"] == 20
