"""Where a process may write, how many threads it gets, and what it may ask of the network: set before torch is imported."""

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
GRACE_SECONDS = "TRIMTAB_GRACE_SECONDS"
"""The pod's terminationGracePeriodSeconds; torchrun's patience stays ten seconds below it."""


def run_file() -> Path:
    """Where run.json is."""
    return Path(os.environ.get(RUN_FILE, contract.RUN_FILE))


def work_root() -> Path:
    """Writable scratch space."""
    return Path(os.environ.get(WORK, contract.WORK_ROOT))


def termination_log() -> Path:
    """Where the termination message goes."""
    return Path(os.environ.get(TERMINATION_LOG, contract.TERMINATION_LOG))


def results_folder() -> Path:
    """Where ranks leave what they have to say for the launcher."""
    return work_root() / "results"


def prepare(root: Path, hub: bool) -> None:
    """Point every library's caches below `root`; keep them off the network unless a source is on the hub."""
    for variable, folder in (
        ("HF_HOME", "huggingface"),
        ("TMPDIR", "tmp"),
        ("MPLCONFIGDIR", "matplotlib"),
        ("XDG_CACHE_HOME", "cache"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
    ):
        path = root / folder
        path.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(path)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not hub:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[variable] = "1"


def threads(processes: int) -> int:
    """Threads for each of `processes` ranks of this pod: the cgroup's CPU limit shared out, at least one."""
    return max(1, int(_cpu_limit() // processes))


def _cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    cores = float(len(os.sched_getaffinity(0)))
    limit_file = cgroup / "cpu.max"
    if limit_file.is_file():
        quota, _, period = limit_file.read_text().strip().partition(" ")
        if quota != "max":
            return min(cores, int(quota) / int(period or 100_000))
    return cores


def log_to_stderr(rank: int | None = None) -> None:
    """One line a record, to standard error; other ranks than the first say warnings alone."""
    where = "" if rank is None else f" rank {rank}"
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank in (None, 0) else logging.WARNING,
        format=f"%(asctime)s %(levelname)s{where} %(name)s: %(message)s",
        force=True,
    )
    for noisy in ("httpx", "botocore", "urllib3", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
