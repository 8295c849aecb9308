"""Several processes over gloo: preemption of one stops all at one step, and the resumed run is the undisturbed one."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import Ranks, StartRanks, history, run_config, spec, training, wait_for
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec

STEPS = 60


def _spec(ranks: int) -> FineTuneJobSpec:
    return spec(
        training=training(maxSteps=STEPS, loggingSteps=7, perDeviceBatchSize=2),
        checkpoint={"saveSteps": 20, "keep": 3},
        distributed={"processesPerNode": ranks},
    )


def _first_checkpoint(output: Path, ranks: Ranks) -> None:
    wait_for((output / "checkpoints/000000020/manifest.json").is_file, 90, f"a checkpoint ({ranks.work})")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
@proves("pretrain", "full", "ddp", "resume")
def test_preempted_and_resumed_run_equals_the_undisturbed_one(
    start_ranks: StartRanks, tmp_path: Path, ranks: int
) -> None:
    calm = start_ranks(run_config(_spec(ranks), tmp_path / "calm"))
    assert calm.end().exit is Exit.OK, calm.log

    disturbed = tmp_path / "disturbed"
    first = start_ranks(run_config(_spec(ranks), disturbed))
    _first_checkpoint(disturbed, first)
    first.signal(ranks - 1, signal.SIGTERM)
    ended = first.end()
    assert (ended.exit, ended.ending.reason) == (Exit.PREEMPTED, Reason.PREEMPTED), first.log
    step = ended.ending.step
    assert step is not None
    assert 20 <= step < STEPS
    random_states = {f"rng_state_{rank}.pth" for rank in range(ranks)} if ranks > 1 else {"rng_state.pth"}
    saved = {path.name for path in (disturbed / f"checkpoints/{step:09d}").iterdir()}
    assert random_states | {"manifest.json"} <= saved

    second = start_ranks(run_config(_spec(ranks), disturbed, attempt=2))
    resumed = second.end()
    assert resumed.exit is Exit.OK, second.log
    assert resumed.ending.from_step == step
    assert history(disturbed) == history(tmp_path / "calm")
    assert _weights(disturbed) == _weights(tmp_path / "calm")


@pytest.mark.timeout(200)
def test_a_killed_rank_ends_all_with_what_happened(start_ranks: StartRanks, tmp_path: Path) -> None:
    running = start_ranks(run_config(_spec(2), tmp_path / "out"))
    _first_checkpoint(tmp_path / "out", running)
    running.signal(1, signal.SIGKILL)
    ended = running.end()
    assert (ended.exit, ended.ending.reason) == (Exit.CRASHED, Reason.CRASHED), running.log
    assert "rank 1 ended without a word" in ended.ending.message
    left = results_of(running)
    assert left == {0: Exit.STALLED}, running.log


def results_of(ranks: Ranks) -> dict[int, Exit]:
    from trimtab_trainer import results

    return {rank: result.exit for rank, result in results.gather(ranks.work / "results").items()}


def _weights(output: Path) -> str:
    return hashlib.sha256((output / "artifact/model.safetensors").read_bytes()).hexdigest()
