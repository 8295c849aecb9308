"""Starts vLLM: waits for the agent's word on the model, derives the command line, and stays in front of the process.

vLLM is a child rather than this process's successor. The first process of a container ignores every signal that it has
no handler for, and vLLM has none while it imports for some ten seconds: a pod deleted then would hang for its whole
grace period. As a child it ends at once, and its own children are taken along.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from trimtab_api.contract import ENGINE_PORT
from trimtab_api.v1alpha1.modeldeployment import ALLOWED_ARGUMENTS
from trimtab_server import handoff
from trimtab_server.handoff import HANDOFF_FILE, Handoff

log = logging.getLogger("trimtab.engine")

WAIT_SECONDS = 6 * 3600.0
"""How long a model may take to be fetched before the container gives up and is started again."""
REMIND_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 120
"""How long vLLM keeps an idle connection: far longer than the agent's pool does, so that it never closes one that the
agent is about to use."""
STOP_SECONDS = 5.0
"""How long what vLLM left behind may take to end after SIGTERM."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine until it ends; returns the exit code of the container."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    options, extra = parser().parse_known_args(arguments)
    refused = [each for each in extra if each.split("=")[0] not in ALLOWED_ARGUMENTS]
    if refused:
        log.error("engine.extraArgs: %s: not allowed; allowed are %s", ", ".join(refused), ", ".join(ALLOWED_ARGUMENTS))
        return 64
    signal.signal(signal.SIGTERM, _leave)
    model = await_handoff(Path(options.handoff), options.wait_seconds)
    if model is None:
        return 75
    cpu = on_cpu()
    return supervise(command(options, extra, model, cpu), environment(os.environ, cpu))


def parser() -> argparse.ArgumentParser:
    """The flags that the operator sets. What it does not know is taken as an extra argument of vLLM and checked."""
    flags = argparse.ArgumentParser(prog="trimtab_server.engine", description=__doc__, allow_abbrev=False)
    flags.add_argument("--handoff", default=HANDOFF_FILE, help="file with the agent's word on the model")
    flags.add_argument("--wait-seconds", type=float, default=WAIT_SECONDS, help="how long to wait for that file")
    flags.add_argument("--port", type=int, default=ENGINE_PORT, help="port on 127.0.0.1")
    flags.add_argument("--max-lora-rank", type=int, default=0, help="room for adapters up to this rank; 0: none")
    flags.add_argument("--max-loras", type=int, default=1, help="adapters in one batch")
    flags.add_argument("--max-cpu-loras", type=int, default=None, help="adapters kept in host memory")
    flags.add_argument("--dtype", default="auto", help="type of weights and arithmetic")
    flags.add_argument("--max-model-len", type=int, default=None, help="tokens of prompt and answer together")
    flags.add_argument("--tensor-parallel-size", type=int, default=1, help="accelerators that share one copy")
    flags.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of an accelerator's memory")
    return flags


def await_handoff(file: Path, wait_seconds: float) -> Handoff | None:
    """Wait until the agent has fetched and verified the model; None when that takes too long."""
    started = time.monotonic()
    reminded = started - REMIND_SECONDS
    while (model := handoff.read(file)) is None:
        now = time.monotonic()
        if now - started > wait_seconds:
            log.error("the agent fetched no model within %.0f s; its log and its report say why", wait_seconds)
            return None
        if now - reminded >= REMIND_SECONDS:
            log.info("waiting for the agent to fetch the model (%.0f s so far)", now - started)
            reminded = now
        time.sleep(0.2)
    log.info("serving %s from %s", model.served_name, model.model_path)
    return model


def command(options: argparse.Namespace, extra: Sequence[str], model: Handoff, cpu: bool) -> list[str]:
    """The command line of vLLM."""
    line = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model.model_path),
        *("--host", "127.0.0.1", "--port", str(options.port)),
        *("--served-model-name", model.served_name),
        # Pickled weights run code when they are opened.
        *("--load-format", "safetensors"),
        *("--dtype", options.dtype),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
        "--disable-uvicorn-access-log",
    ]
    if options.max_model_len is not None:
        line += ["--max-model-len", str(options.max_model_len)]
    if cpu:
        # The image has no compiler, and vLLM's compiled mode on CPUs needs one.
        line += [] if "--enforce-eager" in extra else ["--enforce-eager"]
    else:
        line += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    return [*line, *_lora(options), *extra]


def _lora(options: argparse.Namespace) -> list[str]:
    if options.max_lora_rank <= 0:
        return []
    line = ["--enable-lora", "--max-lora-rank", str(options.max_lora_rank), "--max-loras", str(options.max_loras)]
    if options.max_cpu_loras is not None:
        line += ["--max-cpu-loras", str(max(options.max_cpu_loras, options.max_loras))]
    return line


def environment(given: Mapping[str, str], cpu: bool = False) -> dict[str, str]:
    """The environment of vLLM: nothing from outside, nothing to outside, and all writing below /tmp.

    What the user may tune (`VLLM_CPU_KVCACHE_SPACE`, thread counts) is kept as given.
    """
    scratch = given.get("TMPDIR", "/tmp")  # noqa: S108 - the container's own emptyDir
    tunable = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENGINE_READY_TIMEOUT_S": "3600"}
    fixed = {
        "HOME": scratch,
        "XDG_CACHE_HOME": f"{scratch}/cache",
        "HF_HOME": f"{scratch}/hf",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        # An empty list: no plugin found in the environment is loaded.
        "VLLM_PLUGINS": "",
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if cpu:
        # Eager or not, log-probabilities are counted by a compiled function; without a compiler that ends the engine.
        fixed["TORCH_COMPILE_DISABLE"] = "1"
    return {**tunable, **given, **fixed}


def on_cpu() -> bool:
    """Whether this is the CPU flavour, told as vLLM itself tells it: by its version. False without vLLM."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


def supervise(line: Sequence[str], env: Mapping[str, str], told: Callable[[], object] = bool) -> int:
    """Run vLLM in a process group of its own and end with it; SIGTERM is passed on. Returns the exit code.

    `told`: called when SIGTERM came.
    """
    log.info("starting: %s", " ".join(line))
    child = subprocess.Popen(line, env=dict(env), start_new_session=True)

    def stop(*_: object) -> None:
        told()
        child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        code = child.wait()
    finally:
        _end_group(child.pid)
    # A signal's death is told as a shell tells it, so that the container's exit code shows it.
    return code if code >= 0 else 128 - code


def _end_group(leader: int) -> None:
    """End what vLLM left behind: its workers hold the accelerator's memory and the engine's port."""
    patience = time.monotonic() + STOP_SECONDS
    stages = ((signal.SIGTERM, patience), (signal.SIGKILL, patience + 5))
    for sent, until in stages:
        if not _signal_group(leader, sent):
            return
        while time.monotonic() < until:
            _reap(leader)
            if not _signal_group(leader, 0):
                return
            time.sleep(0.1)


def _signal_group(leader: int, signum: int) -> bool:
    """Send a signal to the group; False when nobody is left in it."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:
        return False
    return True


def _reap(leader: int) -> None:
    """Bury the group's dead: orphans become children of a container's first process, and count as living till then."""
    try:
        while os.waitpid(-leader, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


def _leave(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
