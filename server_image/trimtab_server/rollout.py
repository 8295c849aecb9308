"""The engine beside a trainer: waits for the trainer's word on the model, and answers on the loopback until both end.

An engine that ended has lost its adapters, and the trainer's attempt ends with it: so it is not started again, but its
ending is left where the trainer sees it, and the container stays for its log.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import get_args

from trimtab_api.contract import ENGINE_PORT, ROLLOUT_BASE, ROLLOUT_END, ROLLOUT_MODEL, ROLLOUT_ROOT
from trimtab_api.contract import RolloutBase as Base
from trimtab_api.contract import RolloutEnd as End
from trimtab_api.v1alpha1.modeldeployment import LoraRank
from trimtab_server import engine, renewal

log = logging.getLogger("trimtab.rollout")

STARTED = "started"
"""A file that says that an engine was started: one that was killed with its container leaves no other word."""
KILLED = 137
POLL_SECONDS = 0.2
REMIND_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine until the pod ends; returns the exit code of the container."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    options = parser().parse_args(arguments)
    root = Path(options.root)
    signal.signal(signal.SIGTERM, _leave)
    base = _awaited(root / ROLLOUT_BASE)
    if (root / STARTED).exists():
        # The kubelet started this container again.
        _tell(root, KILLED)
        return _stay()
    (root / STARTED).touch()
    cpu, leaving = engine.on_cpu(), threading.Event()
    code = engine.supervise(command(options, base, cpu), environment(os.environ, base, cpu), leaving.set)
    if leaving.is_set():
        return 0
    _tell(root, code)
    return _stay()


def parser() -> argparse.ArgumentParser:
    """The flags that the operator sets."""
    flags = argparse.ArgumentParser(prog="trimtab_server.rollout", description=__doc__, allow_abbrev=False)
    flags.add_argument("--root", default=ROLLOUT_ROOT, help="folder that the trainer mounts as well")
    flags.add_argument("--port", type=int, default=ENGINE_PORT, help="port on 127.0.0.1")
    flags.add_argument("--tensor-parallel-size", type=int, default=1, help="accelerators that share one copy")
    flags.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of an accelerator's memory")
    return flags


def command(options: argparse.Namespace, base: Base, cpu: bool) -> list[str]:
    """The command line of vLLM: one adapter at a time or none, and nothing decided by the model's own settings."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", base.path),
        *("--host", "127.0.0.1", "--port", str(options.port)),
        *("--served-model-name", ROLLOUT_MODEL),
        # Pickled weights run code when they are opened.
        *("--load-format", "safetensors"),
        *("--dtype", base.dtype),
        *("--max-model-len", str(base.max_model_len)),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
        *_weights(base.max_lora_rank),
        # The model's own settings would fill in whatever a request leaves out.
        *("--generation-config", "vllm"),
        # Of the distribution that is drawn from, after temperature and top-p.
        *("--logprobs-mode", "processed_logprobs"),
        "--disable-uvicorn-access-log",
        # The image has no compiler, and vLLM's compiled mode on CPUs needs one.
        *(("--enforce-eager",) if cpu else ("--gpu-memory-utilization", str(options.gpu_memory_utilization))),
    ]


def _weights(rank: int) -> list[str]:
    """How they are handed over: an adapter of this rank, or for 0 all of them."""
    if not rank:
        return ["--worker-extension-cls", renewal.EXTENSION]
    return ["--enable-lora", "--max-lora-rank", str(room(rank)), "--max-loras", "1", "--max-cpu-loras", "1"]


def environment(given: Mapping[str, str], base: Base, cpu: bool) -> dict[str, str]:
    """The environment of vLLM. Only its developers' mode reads weights anew; the trainer alone reaches the port."""
    return engine.environment(given, cpu) | {"VLLM_SERVER_DEV_MODE": "0" if base.max_lora_rank else "1"}


def room(rank: int) -> int:
    """The next rank that the engine makes room for. Raises ValueError above the highest."""
    found = [each for each in get_args(LoraRank) if each >= rank]
    if not found:
        raise ValueError(f"no engine takes an adapter of rank {rank}")
    return int(found[0])


def _awaited(file: Path) -> Base:
    """The trainer's word. A trainer that has none for us ends, and this container with it."""
    started = time.monotonic()
    reminded = started - REMIND_SECONDS
    while not file.exists():
        if time.monotonic() - reminded >= REMIND_SECONDS:
            reminded = time.monotonic()
            log.info("waiting for the trainer to open the model (%.0f s so far)", reminded - started)
        time.sleep(POLL_SECONDS)
    return Base.read(json.loads(file.read_text()))


def _tell(root: Path, code: int) -> None:
    log.error("the engine ended with code %d", code)
    draft = root / f".{ROLLOUT_END}"
    draft.write_text(json.dumps(End(exit_code=code).dump()))
    draft.replace(root / ROLLOUT_END)


def _stay() -> int:
    """Wait to be told to leave."""
    signal.signal(signal.SIGTERM, _leave)
    while True:
        signal.pause()


def _leave(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
