"""The container's first process: its place in the gang, its codes, and two pods that stop together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.unit.trainer.conftest import Launch, run_config, spec, training, wait_for
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, Exit, RankResult
from trimtab_trainer import launcher, results, workplace
from trimtab_trainer.endings import EXITS, Fault, ending_of

TWO_NODES = spec(
    training=training(maxSteps=2000, loggingSteps=50), checkpoint={"saveSteps": 10}, distributed={"nodes": 2}
)


@pytest.mark.timeout(300)
def test_sigterm_to_one_of_two_pods_stops_both_at_one_step(launch: Launch, tmp_path: Path) -> None:
    config = run_config(TWO_NODES, tmp_path / "out")
    port = str(free_port())
    pods = [
        launch(
            config,
            PET_NNODES="2",
            PET_NODE_RANK=str(node),
            PET_NPROC_PER_NODE="auto",
            WORLD_SIZE="2",
            RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            TRIMTAB_BAR="1",
        )
        for node in range(2)
    ]
    wait_for((tmp_path / "out/checkpoints/000000010/manifest.json").is_file, 150, "a checkpoint", pods[0])
    pods[1].process.send_signal(signal.SIGTERM)
    endings = [pod.end() for pod in pods]
    assert [code for code, _ in endings] == [Exit.PREEMPTED, Exit.PREEMPTED], pods[1].log.read_text()[-2000:]
    steps = {ending.step for _, ending in endings}
    assert len(steps) == 1
    assert (tmp_path / f"out/checkpoints/{steps.pop():09d}/manifest.json").is_file()


def test_a_broken_run_file_is_a_spec_error(launch: Launch, tmp_path: Path) -> None:
    broken = run_config(spec(), tmp_path / "out").model_copy(update={"attempt": -1})
    code, ending = launch(broken).end(within=60)
    assert (code, ending.reason) == (Exit.SPEC_INVALID, Reason.SPEC_INVALID)
    assert "attempt" in ending.message


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"PET_NNODES": "3"}, "a world of 3"),
        ({"PET_NNODES": "2", "WORLD_SIZE": "5"}, "WORLD_SIZE is 5"),
        ({}, "a world of 1"),
    ],
)
def test_another_world_than_the_specs_is_refused(environment: dict[str, str], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=wrong) as caught:
        launcher.Gang.of(environment, run_config(TWO_NODES, tmp_path))
    assert caught.value.reason is Reason.SPEC_INVALID


def test_the_injected_environment_becomes_torchruns_arguments(tmp_path: Path) -> None:
    environment = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "job-1-master-0",
        "MASTER_PORT": "23456",
        "TRIMTAB_GRACE_SECONDS": "60",
    }
    gang = launcher.Gang.of(environment, run_config(TWO_NODES, tmp_path))
    assert gang.ranks == range(1, 2)
    wanted = {"--nnodes=2", "--node-rank=1", "--nproc-per-node=1"}
    assert wanted | {"--master-addr=job-1-master-0", "--master-port=23456"} <= set(gang.command())
    given = launcher.environment_for(gang, environment)
    assert given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "50"
    assert not [name for name in given if name.startswith("PET_")]


def _result(rank: int, reason: Reason) -> RankResult:
    return RankResult(rank=rank, exit=EXITS[reason], ending=Ending(reason=reason, message=f"of {rank}"))


@pytest.mark.parametrize(
    ("left", "signalled", "oom", "wanted"),
    [
        ([Reason.SUCCEEDED, Reason.SUCCEEDED], False, False, Reason.SUCCEEDED),
        ([Reason.STALLED, Reason.DISK_FULL], False, False, Reason.DISK_FULL),
        ([Reason.STALLED, Reason.CRASHED], False, False, Reason.CRASHED),
        ([Reason.STALLED, None], False, False, Reason.CRASHED),
        ([Reason.STALLED, None], False, True, Reason.OUT_OF_MEMORY),
        ([None, None], True, False, Reason.PREEMPTED),
        ([Reason.PREEMPTED, Reason.PREEMPTED], True, False, Reason.PREEMPTED),
        ([Reason.STALLED, Reason.PREEMPTED], False, False, Reason.STALLED),
    ],
)
def test_a_cause_outweighs_its_consequences(
    left: list[Reason | None], signalled: bool, oom: bool, wanted: Reason
) -> None:
    found = {rank: _result(rank, reason) for rank, reason in enumerate(left) if reason is not None}
    concluded = results.conclude(found, range(2), signalled=signalled, out_of_memory=oom, exit_code=1)
    assert concluded.ending.reason is wanted
    assert concluded.exit is EXITS[wanted]


def test_results_survive_the_way_through_files(tmp_path: Path) -> None:
    results.announce(tmp_path, 0)
    results.leave(tmp_path, _result(1, Reason.DISK_FULL))
    assert results.gather(tmp_path) == {1: _result(1, Reason.DISK_FULL)}
    results.clear(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limit", "processes", "wanted"), [("150000 100000", 1, 1), ("100000 100000", 2, 1), ("50000 100000", 1, 1)]
)
def test_threads_follow_the_cpu_limit(tmp_path: Path, limit: str, processes: int, wanted: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert workplace.threads(processes, tmp_path) == wanted


def test_kernel_kills_are_counted(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    assert launcher.oom_kills(events) == 0
    events.write_text("low 0\noom 3\noom_kill 2\n")
    assert launcher.oom_kills(events) == 2


def test_every_reason_has_its_code() -> None:
    for reason, code in EXITS.items():
        assert ending_of(Fault(reason, "x"))[0] is code
