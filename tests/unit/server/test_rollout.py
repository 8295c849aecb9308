"""The engine beside a trainer: how vLLM is started there, and what is told of its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab_api.contract import ROLLOUT_READ, RolloutBase
from trimtab_server import renewal, rollout

BASE = RolloutBase(path="/work/run/model", dtype="bfloat16", max_model_len=96, max_lora_rank=12)


def line(*flags: str, cpu: bool = True) -> str:
    return " ".join(rollout.command(rollout.parser().parse_args(flags), BASE, cpu)[1:])


def test_the_command_takes_one_adapter_and_nothing_from_the_model_s_own_settings() -> None:
    assert line() == (
        "-m vllm.entrypoints.cli.main serve /work/run/model --host 127.0.0.1 --port 8001 --served-model-name base "
        "--load-format safetensors --dtype bfloat16 --max-model-len 96 --tensor-parallel-size 1 --enable-lora "
        "--max-lora-rank 16 --max-loras 1 --max-cpu-loras 1 --generation-config vllm "
        "--logprobs-mode processed_logprobs --disable-uvicorn-access-log --enforce-eager"
    )
    told = line("--tensor-parallel-size=2", "--gpu-memory-utilization=0.5", cpu=False)
    assert "--tensor-parallel-size 2 " in told
    assert told.endswith("--gpu-memory-utilization 0.5")


def test_all_weights_are_read_anew_in_the_developers_mode_alone() -> None:
    whole = BASE.model_copy(update={"max_lora_rank": 0})
    told = " ".join(rollout.command(rollout.parser().parse_args([]), whole, cpu=True))
    assert "lora" not in told
    assert " --worker-extension-cls trimtab_server.renewal.Renewal " in told
    modes = [rollout.environment({}, base, cpu=True)["VLLM_SERVER_DEV_MODE"] for base in (BASE, whole)]
    assert modes == ["0", "1"]


class Part:
    """A part of an engine's model, with the name that vLLM gives such a class."""

    def __init__(self, packed: bool):
        self.packed: list[Part] = []
        if packed:
            self.cpu_linear = self.packed.append
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.packed.append)


class ParallelLMHead(Part):
    """vLLM's name of a head."""


def test_a_head_that_shares_the_embeddings_is_packed_again_where_it_is_packed() -> None:
    layer, packed, plain = Part(packed=True), ParallelLMHead(packed=True), ParallelLMHead(packed=False)
    read: list[str] = []

    class Worker(renewal.Renewal):
        model_runner = SimpleNamespace(model=SimpleNamespace(modules=lambda: [layer, packed, plain]))

        def reload_weights(self, weights_path: str) -> None:
            assert not packed.packed
            read.append(weights_path)

    getattr(Worker(), ROLLOUT_READ)(folder="/rollout/step-3")
    assert read == ["/rollout/step-3"]
    assert (layer.packed, packed.packed, plain.packed) == ([], [packed], [])


@pytest.mark.parametrize(("rank", "wanted"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_ranks_are_rounded_up_to_those_that_the_engine_knows(rank: int, wanted: int) -> None:
    assert rollout.room(rank) == wanted


BESIDE = """
import sys
from trimtab_server import rollout
rollout.command = lambda *_: [sys.executable, "-c", sys.argv[2]]
sys.exit(rollout.main(["--root", sys.argv[1]]))
"""


def started(root: Path, engine: str) -> subprocess.Popen[bytes]:
    with (root / "log").open("w") as log:
        return subprocess.Popen([sys.executable, "-c", BESIDE, root, engine], stderr=log)


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def ended(root: Path) -> int:
    until((root / "ended.json").exists, "its end is not told")
    code: int = json.loads((root / "ended.json").read_text())["exitCode"]
    return code


def test_an_engine_that_ended_is_told_and_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(BASE.dump()))
    beside = started(tmp_path, "raise SystemExit(3)")
    try:
        assert ended(tmp_path) == 3
        assert beside.poll() is None
    finally:
        beside.send_signal(signal.SIGTERM)
    assert beside.wait(10) == 0
    # As when the kubelet starts the container again after memory ran out: no word was left.
    (tmp_path / "ended.json").unlink()
    again = started(tmp_path, "open('never', 'w')")
    try:
        assert ended(tmp_path) == 137
    finally:
        again.send_signal(signal.SIGTERM)
    assert again.wait(10) == 0


@pytest.mark.parametrize("told", [True, False], ids=["it runs", "it waits for the trainer"])
def test_it_leaves_when_it_is_told_to(told: bool, tmp_path: Path) -> None:
    if told:
        (tmp_path / "base.json").write_text(json.dumps(BASE.dump()))
    beside = started(tmp_path, "import sys, time; sys.stderr.write('up\\n'); time.sleep(60)")
    word = "\nup" if told else "waiting for the trainer"
    until(lambda: word in (tmp_path / "log").read_text(), "it does not come up")
    beside.send_signal(signal.SIGTERM)
    assert beside.wait(20) == 0
    assert not (tmp_path / "ended.json").exists()
