"""The operator with a thousand idle FineTuneJobs: from apply to the PyTorchJob, memory, CPU at rest, and a restart.

    python -m bench.operator [--json] [--jobs 1000] [--samples 60]

API server and etcd of lab/ share the machine's cores with the operator. There is no kubelet: this program plays the
preflight's pod, as quickly as it can, and its time is in the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from lab.controlplane import ControlPlane
from tests.api.client import GROUP, Api
from tests.api.conftest import kinds_of
from tests.api.stage import OperatorProcess
from tests.api.training import Training

REST_SECONDS = 20.0
"""How long the operator is watched doing nothing."""
PATIENCE_SECONDS = 180.0
POLL_SECONDS = 0.005
LOOK_SECONDS = 0.1
"""Pace of asking the operator for its figures, which takes its time."""


class Figure(NamedTuple):
    """One measured number beside what is wanted of it."""

    name: str
    value: float
    unit: str
    wanted: float | None


def main() -> int:
    """Measure and print; 1 when a wanted figure was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--jobs", type=int, default=1000, help="idle FineTuneJobs")
    parser.add_argument("--samples", type=int, default=60, help="jobs that are applied and timed")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder, ControlPlane(Path(folder) / "plane") as plane:
        figures = measure(plane, Path(folder), chosen.jobs, chosen.samples)
    if chosen.json:
        print(json.dumps({each.name: round(each.value, 4) for each in figures}))
    else:
        for each in figures:
            wanted = f"want < {each.wanted:g} {each.unit}" if each.wanted is not None else ""
            print(f"{each.name:48} {each.value:10.3f} {each.unit:4} {wanted}")
    return int(any(each.wanted is not None and each.value >= each.wanted for each in figures))


def measure(plane: ControlPlane, folder: Path, jobs: int, samples: int) -> list[Figure]:
    """All figures, on a control plane that is empty yet."""
    api = served(plane)
    stage = Training(api, "idle")
    for namespace in ("idle", "timed"):
        api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    operator = OperatorProcess(plane.kubeconfig, folder / "operator")
    try:
        return timed(operator, api, stage, jobs, samples)
    finally:
        operator.kill()


def timed(operator: OperatorProcess, api: Api, stage: Training, jobs: int, samples: int) -> list[Figure]:
    """The figures, in the order in which they disturb each other least."""
    for number in range(jobs):
        stage.apply(f"idle-{number:04}", model={"from": {"fineTuneJob": {"name": "not-yet"}}})
    first = seen_after(operator, jobs)
    operator.kill()
    restart = seen_after(operator, jobs)
    assert operator.process is not None
    process = psutil.Process(operator.process.pid)
    rest = at_rest(process)  # before the timed jobs, whose pods never come and are looked for
    delays = sorted(delay(Training(api, "timed"), f"timed-{number:03}") for number in range(samples))
    memory = process.memory_info().rss / 2**20
    return [
        Figure(f"start until {jobs} new jobs were worked off", first, "s", None),
        Figure(f"restart until {jobs} idle jobs were seen", restart, "s", 5.0),
        Figure("apply to PyTorchJob, p50", statistics.median(delays), "s", None),
        Figure("apply to PyTorchJob, p99", delays[min(len(delays) - 1, int(len(delays) * 0.99))], "s", 1.0),
        Figure("memory", memory, "MiB", 150.0),
        Figure("CPU at rest", rest, "%", 1.0),
    ]


def served(plane: ControlPlane) -> Api:
    """The API server with our kinds and training-operator's."""
    kinds_of(plane)
    api = Api(plane)
    wait(lambda: api.request("GET", f"{GROUP}/modeldeployments").accepted, "our kinds are served")
    return api


def seen_after(operator: OperatorProcess, jobs: int) -> float:
    """Seconds from the start of the process until it has looked at every job."""
    started = time.monotonic()
    operator.start()
    wait(lambda: looks(operator) >= jobs, f"{jobs} looks", LOOK_SECONDS)
    return time.monotonic() - started


def looks(operator: OperatorProcess) -> float:
    """FineTuneJobs that were looked at and found in order, one by one or in a survey, as the metrics tell."""
    try:
        figures = operator.figures()
    except OSError:
        return 0
    counts = [f'trimtab_reconcile_seconds_count{{kind="FineTuneJob",result="{each}"}}' for each in ("ok", "rests")]
    return sum(float(each.split()[-1]) for each in figures.splitlines() if each.startswith(tuple(counts)))


def delay(stage: Training, name: str) -> float:
    """Seconds from apply to the PyTorchJob, the preflight played in between."""
    started = time.monotonic()
    stage.apply(name)
    wait(lambda: stage.get("Job", f"{name}-preflight") is not None, f"the preflight of {name}")
    stage.check(name)
    wait(lambda: stage.get("PyTorchJob", f"{name}-1") is not None, f"the PyTorchJob of {name}")
    return time.monotonic() - started


def at_rest(process: psutil.Process) -> float:
    """Percent of one core that the process takes while nothing changes."""
    time.sleep(5)  # what the last change brought about is over then
    before = process.cpu_times()
    time.sleep(REST_SECONDS)
    after = process.cpu_times()
    return 100 * (after.user + after.system - before.user - before.system) / REST_SECONDS


def wait(probe: Callable[[], bool], what: str, pace: float = POLL_SECONDS) -> None:
    """Until the probe holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not probe():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(pace)


if __name__ == "__main__":
    sys.exit(main())
