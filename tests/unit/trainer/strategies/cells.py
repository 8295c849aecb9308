"""Many runs in the same two processes: importing costs a process far more than a tiny run does."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.unit.trainer.conftest import PRELOADED
from trimtab_api.contract import Ending, RunConfig


@dataclass(frozen=True)
class Cell:
    """One run."""

    config: RunConfig
    stop_after: int | None = None
    """Steps after which its last process is told to leave."""
    key: str | None = None
    """Under which its ending is kept; by default the job's name."""
    one_pod: bool = False
    """Whether the processes share a disk."""

    @property
    def name(self) -> str:
        """Under which its ending is kept."""
        return self.key or self.config.job.name


def run_all(
    first: Cell, alone: Sequence[Cell], together: Sequence[Cell], work: Path, patience: float
) -> dict[str, Ending]:
    """The endings, by name: the `first` run, then those `alone` shared out over two processes, then those in both.

    Of the last, each process is a pod with a disk of its own; the output is what they share.
    """
    (work / "endings").mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    shares = ([first, *alone[0::2]], alone[1::2])
    processes = [
        context.Process(target=_process, args=(rank, port, share, first, together, work))
        for rank, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [process for process in processes if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    assert not hung, f"hangs: {log(work)}"
    return {path.stem: Ending.model_validate_json(path.read_text()) for path in (work / "endings").iterdir()}


def log(work: Path) -> str:
    """The ends of what the processes wrote."""
    return "\n".join(path.read_text()[-4000:] for path in sorted(work.glob("log-*")))


def _process(rank: int, port: int, alone: Sequence[Cell], first: Cell, together: Sequence[Cell], work: Path) -> None:
    stream = os.open(work / f"log-{rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    from trimtab_trainer import workplace
    from trimtab_trainer.distributed import Group, Place

    # As a rank does: a collection after each run does not look through the libraries.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    workplace.log_to_stderr(rank)
    workplace.prepare(work / f"place-{rank}", hub=False)
    if rank == 1:
        _await(work / "endings" / f"{first.name}.json")
    for cell in alone:
        _run(cell, Group(Place(0, 0, 1, 1), 1, 60), work)
    if together:
        # Each is a pod of its own, with a disk of its own.
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        group = Group(Place.here(), 2, 90)
        group.join()
        beside = Group(Place(rank, rank, 2, 2), 2, 90)
        beside._control = group._control
        for cell in together:
            os.environ["LOCAL_RANK"] = str(rank if cell.one_pod else 0)
            _run(cell, beside if cell.one_pod else group, work)
    sys.stdout.flush()
    os._exit(0)


def _await(path: Path) -> None:
    deadline = time.monotonic() + 90
    while not path.is_file():
        assert time.monotonic() < deadline, f"waited in vain for {path}"
        time.sleep(0.05)


def _run(cell: Cell, group: Any, work: Path) -> None:
    from trimtab_trainer.endings import ending_of
    from trimtab_trainer.notice import Notice
    from trimtab_trainer.progress import Silent
    from trimtab_trainer.run import Run

    _forget()
    began = time.monotonic()
    last = group.place.rank == group.place.world - 1
    notice: Any = _StopAfter(cell.stop_after) if cell.stop_after and last else Notice()
    pod = group.place.rank - group.place.local_rank
    disk = work / f"pod-{pod}" / cell.name
    run = Run(cell.config, group, disk, notice, Silent())
    try:
        ending = run()
    except Exception as error:  # noqa: BLE001 - as in the trainer's door: whatever it is becomes an ending
        traceback.print_exc()
        ending = ending_of(error)[1]
    print(f"{cell.name}: {time.monotonic() - began:.1f} s {ending.reason}", flush=True)
    if group.place.first:
        path = work / "endings" / f"{cell.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(ending.dump()))
        path.with_suffix(".tmp").rename(path)


def _forget() -> None:
    """A run has its process for itself, and libraries leave their switches in it."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()


class _StopAfter:
    """A notice that is given once some steps are done; it is asked once before the first."""

    def __init__(self, steps: int):
        self._left = steps

    @property
    def given(self) -> bool:
        """Whether to leave now."""
        self._left -= 1
        return self._left < 0
