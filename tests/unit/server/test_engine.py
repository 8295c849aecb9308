"""How vLLM is started, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab_server import engine, handoff
from trimtab_server.handoff import Handoff

MODEL = Handoff(name="base", model_path="/work/cache/sha256-1", digest="sha256:" + "ab" * 32)


def line(*flags: str, extra: tuple[str, ...] = (), cpu: bool = True) -> str:
    return " ".join(engine.command(engine.parser().parse_args(flags), extra, MODEL, cpu)[1:])


def test_the_command_serves_the_exact_name_on_the_loopback_from_safetensors_alone() -> None:
    told = line("--dtype=float32", "--max-model-len=256", "--tensor-parallel-size=2")
    assert told == (
        "-m vllm.entrypoints.cli.main serve /work/cache/sha256-1 --host 127.0.0.1 --port 8001 "
        "--served-model-name base@abababababab --load-format safetensors --dtype float32 --tensor-parallel-size 2 "
        "--disable-uvicorn-access-log --max-model-len 256 --enforce-eager"
    )


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--max-lora-rank=0", "--max-loras=4"), ""),
        (("--max-lora-rank=16", "--max-loras=4"), "--enable-lora --max-lora-rank 16 --max-loras 4"),
        (
            ("--max-lora-rank=64", "--max-loras=4", "--max-cpu-loras=2"),
            "--enable-lora --max-lora-rank 64 --max-loras 4 --max-cpu-loras 4",
        ),
    ],
)
def test_room_for_adapters(flags: tuple[str, ...], wanted: str) -> None:
    assert line(*flags).partition("--enforce-eager")[2].strip() == wanted


def test_accelerators_get_their_share_of_memory_and_are_compiled_for() -> None:
    told = line("--gpu-memory-utilization=0.5", cpu=False)
    assert "--gpu-memory-utilization 0.5" in told
    assert "--enforce-eager" not in told
    assert line(extra=("--enforce-eager",)).count("--enforce-eager") == 1


@pytest.mark.parametrize("argument", ["--trust-remote-code", "--host=0.0.0.0", "--load-format=pt", "--plugins=x", "x"])
def test_arguments_beyond_the_allow_list_are_refused(argument: str, tmp_path: Path) -> None:
    assert engine.main([f"--handoff={tmp_path / 'none'}", "--wait-seconds=0", argument]) == 64


def test_it_waits_for_the_agent_no_longer_than_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert engine.await_handoff(tmp_path / "handoff.json", 0.3) is None
    assert "the agent fetched no model" in caplog.text


def test_the_handoff_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "engine" / "handoff.json"
    assert handoff.read(file) is None
    handoff.write(MODEL, file)
    assert handoff.read(file) == engine.await_handoff(file, 0) == MODEL
    assert file.stat().st_mode & 0o777 == 0o644
    file.write_text(json.dumps({"name": "base"}))
    with pytest.raises(ValueError, match="delete the pod"):
        handoff.read(file)


def test_the_environment_is_closed_and_keeps_what_users_may_tune() -> None:
    env = engine.environment(
        {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "x", "A": "b"}
    )
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["A"]) == ("4", "b")
    assert (env["VLLM_SERVER_DEV_MODE"], env["VLLM_PLUGINS"], env["HF_HUB_OFFLINE"]) == ("0", "", "1")
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert engine.environment({})["VLLM_CPU_KVCACHE_SPACE"] == "1"
    # Without a compiler the first request for log-probabilities would end the engine.
    assert engine.environment({}, cpu=True)["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in engine.environment({})


CHILD = """
import os, signal, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
grandchild.stdout.readline()
open(sys.argv[1], "w").write(str(grandchild.pid))
time.sleep(60)
"""
SUPERVISOR = """
import os, sys
from trimtab_server import engine
engine.STOP_SECONDS = 0.5
sys.exit(engine.supervise([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ))
"""


@pytest.mark.parametrize(
    ("sent", "to", "code"),
    [(signal.SIGTERM, "supervisor", 143), (signal.SIGKILL, "child", 137)],
    ids=["told to end", "killed"],
)
def test_it_ends_with_all_that_it_started(sent: signal.Signals, to: str, code: int, tmp_path: Path) -> None:
    told = tmp_path / "grandchild"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, CHILD, told])
    try:
        grandchild = int(_until(lambda: told.exists() and told.read_text(), "the grandchild runs"))
        child = int(Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()[0])
        os.kill(supervisor.pid if to == "supervisor" else child, sent)
        assert supervisor.wait(20) == code
        _until(lambda: not _alive(grandchild), "the grandchild is gone")
    finally:
        supervisor.kill()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(holds: object, what: str) -> str:
    deadline = time.monotonic() + 20
    while True:
        found = holds()  # type: ignore[operator]
        if found:
            return str(found)
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
