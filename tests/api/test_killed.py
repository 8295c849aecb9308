"""The operator killed between any two effects: each of its lives makes one write, and the job still has one way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.client import Api
from tests.api.stage import OperatorProcess, eventually
from tests.api.training import Training

LIVES = 60


@pytest.fixture
def mortal(operator_kubeconfig: Path, tmp_path: Path) -> Iterator[OperatorProcess]:
    process = OperatorProcess(operator_kubeconfig, tmp_path, module="tests.api.faulty")
    yield process
    process.kill()


def live(operator: OperatorProcess, until: Callable[[], Any]) -> None:
    """Lives of the operator, until something is there."""
    for _ in range(LIVES):
        if until():
            return
        operator.start()
        process = operator.process
        assert process is not None
        eventually(lambda p=process: p.poll() is not None or until(), "a write", 60)  # type: ignore[misc]
        operator.kill()
    raise AssertionError(f"not after {LIVES} lives\n{operator.log()[-3000:]}")


@pytest.fixture
def stage(api: Api, namespace: str) -> Training:
    return Training(api, namespace)


@pytest.mark.timeout(900)
def test_it_converges(mortal: OperatorProcess, stage: Training) -> None:
    stage.apply("job")
    live(mortal, lambda: stage.get("Job", "job-preflight"))
    stage.check("job")
    live(mortal, lambda: stage.told("job").get("attempt") == 1)
    live(mortal, lambda: stage.told("job")["attempts"][0].get("uid"))
    assert stage.get("Job", "job-preflight") is None
    (pod,) = stage.gang("job")
    stage.end(pod, 74, {"reason": "StorageFailed", "message": "gone", "step": 3})
    live(mortal, lambda: stage.told("job")["attempts"][0].get("endTime"))
    live(mortal, lambda: stage.get("PyTorchJob", "job-2"))
    (pod,) = stage.gang("job", 2)
    stage.succeed(pod, "s3://results/runs/x/artifact")
    live(mortal, lambda: stage.told("job").get("completionTime"))
    told = stage.told("job")
    assert [(each["number"], each["reason"]) for each in told["attempts"]] == [(1, "StorageFailed"), (2, "Succeeded")]
    assert told["failures"] == 1


@pytest.mark.timeout(600)
def test_a_spec_edited_while_an_attempt_begins_is_the_one_that_runs_or_is_refused(
    mortal: OperatorProcess, stage: Training
) -> None:
    stage.apply("edit")
    live(mortal, lambda: stage.get("Job", "edit-preflight"))
    stage.check("edit")
    stage.patch("FineTuneJob", "edit", {"spec": {"checkpoint": {"saveSteps": 50}}})
    live(mortal, lambda: stage.told("edit").get("attempt") == 1)
    assert stage.get("PyTorchJob", "edit-1") is None, "the attempt stands in status before anything of it is made"
    assert stage.get("ConfigMap", "edit-1-run") is None
    late = stage.try_patch("FineTuneJob", "edit", {"spec": {"checkpoint": {"saveSteps": 60}}})
    assert not late.accepted
    assert "may not change once the job has started" in late.message
    live(mortal, lambda: stage.get("PyTorchJob", "edit-1"))
    config = json.loads((stage.get("ConfigMap", "edit-1-run") or {})["data"]["run.json"])
    assert config["spec"]["checkpoint"]["saveSteps"] == 50
