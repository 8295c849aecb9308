"""A thousand FineTuneJobs: each gets its state in bounded time and memory, and a restart sees all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from lab.controlplane import ControlPlane
from tests.api.client import Api
from tests.api.conftest import kinds_of
from tests.api.stage import OperatorProcess, eventually
from tests.api.training import Training

pytestmark = pytest.mark.timeout(600)

JOBS = 1000
MEMORY_LIMIT = 150 * 2**20
"""Of the operator's process, in bytes."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Training, OperatorProcess]]:
    """A thousand jobs on a control plane that goes with them: some wait, some are suspended, some have just come."""
    folder = tmp_path_factory.mktemp("crowd")
    with ControlPlane(folder / "plane") as plane:
        kinds_of(plane)
        api = Api(plane)
        assert api.request("POST", "/api/v1/namespaces", {"metadata": {"name": "crowd"}}).accepted
        stage = Training(api, "crowd")
        for number in range(JOBS):
            stage.apply(f"job-{number:04}", **spec(number))
        operator = OperatorProcess(plane.kubeconfig, folder / "operator")
        yield stage, operator
        operator.kill()
        api.close()


def spec(number: int) -> dict[str, object]:
    """What this job asks for; see EXPECTED."""
    if number % 20 == 0:
        return {"suspend": True}
    if number % 20 == 1:
        return {}
    return {"model": {"from": {"fineTuneJob": {"name": "not-yet"}}}}


EXPECTED = Counter(Suspended=JOBS // 20, Checking=JOBS // 20, Waiting=JOBS - 2 * (JOBS // 20))


def states(stage: Training) -> Counter[str]:
    """How many jobs say what."""
    found: Counter[str] = Counter()
    for job in stage.items("FineTuneJob"):
        conditions = job.get("status", {}).get("conditions", [])
        found[next((each["reason"] for each in conditions if each["type"] == "Succeeded"), "none")] += 1
    return found


def test_each_gets_its_state_within_bounds(crowd: tuple[Training, OperatorProcess]) -> None:
    stage, operator = crowd
    operator.start()
    eventually(lambda: states(stage) == EXPECTED, lambda: states(stage), 180)
    assert len(stage.items("Job")) == EXPECTED["Checking"]
    assert operator.process is not None
    assert psutil.Process(operator.process.pid).memory_info().rss < MEMORY_LIMIT
    assert operator.healthy()


def test_a_restart_sees_all_of_them_and_changes_none(crowd: tuple[Training, OperatorProcess]) -> None:
    stage, operator = crowd
    operator.kill()
    before = {job["metadata"]["name"]: job["metadata"]["resourceVersion"] for job in stage.items("FineTuneJob")}
    operator.start()
    eventually(lambda: seen(operator) >= JOBS, lambda: seen(operator), 120)
    stage.patch("FineTuneJob", "job-0000", {"spec": {"suspend": False}})
    stage.until_there("Job", "job-0000-preflight", 40)  # and it works on
    after = {job["metadata"]["name"]: job["metadata"]["resourceVersion"] for job in stage.items("FineTuneJob")}
    assert [name for name in before if before[name] != after[name]] == ["job-0000"]
    assert operator.process is not None
    assert psutil.Process(operator.process.pid).memory_info().rss < MEMORY_LIMIT


def seen(operator: OperatorProcess) -> float:
    """FineTuneJobs that the operator has decided about since it started."""
    try:
        figures = operator.figures()
    except OSError:
        return 0
    lines = [line for line in figures.splitlines() if line.startswith("trimtab_reconcile_seconds_count")]
    return sum(float(line.split()[-1]) for line in lines if 'kind="FineTuneJob"' in line)
