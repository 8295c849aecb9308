"""A run that reports no step for hangTimeoutSeconds, whose least is a minute: the operator's clock is moved on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.api.client import Api
from tests.api.stage import OperatorProcess, eventually
from tests.api.training import Training


@pytest.fixture
def hurry(tmp_path: Path) -> Path:
    """How many seconds the operator's clock is ahead."""
    path = tmp_path / "hurry"
    path.write_text("0")
    return path


@pytest.fixture
def stage(api: Api, namespace: str, operator_kubeconfig: Path, tmp_path: Path, hurry: Path) -> Iterator[Training]:
    process = OperatorProcess(
        operator_kubeconfig, tmp_path, module="tests.api.hurried", environment={"HURRY": str(hurry)}
    )
    process.start()
    yield Training(api, namespace)
    process.kill()
    assert "Traceback" not in process.log()


def at(seconds: float) -> str:
    """A moment this many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_run_that_falls_silent_is_ended_and_begun_again(stage: Training, hurry: Path) -> None:
    stage.apply("silent", hangTimeoutSeconds=60)
    stage.check("silent")
    (master,) = stage.gang("silent")
    stage.until("silent", "Running")
    hurry.write_text("600")
    stage.report("silent", 1, 5, updatedTime=at(580))
    eventually(lambda: stage.told("silent").get("progress", {}).get("step") == 5, "the report is read", 40)
    assert stage.leading("FineTuneJob", "silent")["reason"] == "Running", "20 s ago a step was reported"
    hurry.write_text("660")
    stage.patch("FineTuneJob", "silent", {"metadata": {"annotations": {"look": "again"}}})
    stage.until_gone("PyTorchJob", "silent-1", 40)
    assert "no step was reported" in stage.told("silent")["attempts"][0]["message"]
    stage.end(master, 76, {"reason": "Preempted", "message": "step 5 is saved", "step": 5})
    stage.until_there("PyTorchJob", "silent-2", 40)
    first = stage.told("silent")["attempts"][0]
    assert (first["reason"], first["toStep"]) == ("Stalled", 5)
    assert stage.told("silent")["failures"] == 1
