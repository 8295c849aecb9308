"""vLLM beside the trainer, in its pod: it draws from the weights of each step."""

from __future__ import annotations

import pytest

from tests.e2e.test_3_methods import STEPS, shown
from tests.e2e.workspace import Workspace


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_an_engine_beside_the_trainer_draws_from_the_weights_as_they_are(line: Workspace, tuner: str) -> None:
    line.until_true("finetunejob", "base", 240)
    document = shown("methods", "grpo-vllm", tuner={"type": tuner})
    document["metadata"]["name"] = name = f"grpo-vllm-{tuner}"
    spec = document["spec"]
    # This base knows no sums: all its answers would earn nothing, and no weight would move.
    spec["grpo"]["rewards"] = [{"name": "repetition"}, {"name": "softOverlong"}]
    # Far enough for an answer of older weights to be another one's.
    spec["training"]["learningRate"] = {"lora": 5e-3, "full": 1e-3}[tuner]
    line.apply(document)
    # vLLM's start alone takes a minute on two cores.
    job = line.until_true("finetunejob", name, 480)
    assert job["status"]["artifact"]["kind"] == {"lora": "adapter", "full": "model"}[tuner]
    assert job["status"]["attempt"] == 1
    pod = line.find("pods", "-l", f"trimtab.dev/name={name},trimtab.dev/role=trainer")[0]
    (engine,) = (each for each in pod["spec"]["initContainers"] if each["name"] == "rollout")
    assert engine["restartPolicy"] == "Always"
    # vLLM's own count of what it drew, against a forward pass of the weights that are trained.
    metrics = job["status"]["progress"]["metrics"]
    assert metrics["sampling/sampling_logp_difference/max"] < 0.01
    if tuner == "lora":
        told = line.kubectl("logs", pod["metadata"]["name"], "-c", "rollout")
        assert [f"'step-{step}'" in told for step in range(STEPS + 1)] == [True] * STEPS + [False]
