"""Where a process may write, how many threads it gets, what it may ask of the network: set before torch comes."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from trimtab_api import contract

log = logging.getLogger(__name__)

RUN_FILE = "TRIMTAB_RUN_FILE"
"""Overrides contract.RUN_FILE."""
WORK = "TRIMTAB_WORK"
"""Overrides contract.WORK_ROOT."""
TERMINATION_LOG = "TRIMTAB_TERMINATION_LOG"
"""Overrides contract.TERMINATION_LOG."""
ROLLOUT = "TRIMTAB_ROLLOUT"
"""Overrides contract.ROLLOUT_ROOT."""
ENGINE_PORT = "TRIMTAB_ENGINE_PORT"
"""Overrides contract.ENGINE_PORT."""
BAR = "TRIMTAB_BAR"
"""Set where a person watches: a bar instead of a ConfigMap and metrics."""
GRACE_SECONDS = "TRIMTAB_GRACE_SECONDS"
"""The pod's terminationGracePeriodSeconds; torchrun's patience stays ten seconds below it."""


_CACHES = {
    "HF_HOME": "huggingface",
    "TMPDIR": "tmp",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
}
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def run_file() -> Path:
    """Where run.json is."""
    return Path(os.environ.get(RUN_FILE, contract.RUN_FILE))


def work_root() -> Path:
    """Writable scratch space."""
    return Path(os.environ.get(WORK, contract.WORK_ROOT))


def termination_log() -> Path:
    """Where the termination message goes."""
    return Path(os.environ.get(TERMINATION_LOG, contract.TERMINATION_LOG))


def rollout_root() -> Path:
    """What is shared with the engine beside the trainer."""
    return Path(os.environ.get(ROLLOUT, contract.ROLLOUT_ROOT))


def engine_port() -> int:
    """Where that engine listens, on the loopback."""
    return int(os.environ.get(ENGINE_PORT, contract.ENGINE_PORT))


def results_folder() -> Path:
    """Where ranks leave what they have to say for the launcher."""
    return work_root() / "results"


def prepare(root: Path, hub: bool, tokenising: int = 1) -> None:
    """Point every library's caches below `root`; keep them off the network unless a source is on the hub.

    `tokenising`: how many threads may tokenise.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if tokenising > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(tokenising)
    for variable, folder in _CACHES.items():
        path = root / folder
        path.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(path)
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    if not hub:
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))


def settings() -> dict[str, str]:
    """What `prepare` has set, for a child's environment."""
    return {name: os.environ[name] for name in (*_CACHES, *_QUIET, *_OFFLINE) if name in os.environ}


def threads(processes: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads for each of `processes` ranks of this pod: the cgroup's CPU limit shared out, at least one."""
    return max(1, int(_cpu_limit(cgroup) // processes))


def _cpu_limit(cgroup: Path) -> float:
    cores = float(len(os.sched_getaffinity(0)))
    limit_file = cgroup / "cpu.max"
    if limit_file.is_file():
        quota, _, period = limit_file.read_text().strip().partition(" ")
        if quota != "max":
            return min(cores, int(quota) / int(period or 100_000))
    return cores


def log_to_stderr(rank: int | None = None, quiet: bool = False) -> None:
    """One line a record, to standard error; other ranks than the first, and all when quiet, say warnings alone."""
    where = "" if rank is None else f" rank {rank}"
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank in (None, 0) and not quiet else logging.WARNING,
        format=f"%(asctime)s %(levelname)s{where} %(name)s: %(message)s",
        force=True,
    )
    for noisy in ("httpx", "botocore", "urllib3", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
