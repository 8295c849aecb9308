"""What ranks leave for the launcher, and how the launcher makes one ending of it.

torchrun exits with 1 whatever its children returned, so each rank writes what it has to say into a file.
"""

from __future__ import annotations

import os
from pathlib import Path

from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, RankResult
from trimtab_trainer.endings import EXITS, Fault, ending_of

_CONSEQUENCES = (Exit.STALLED, Exit.CRASHED, Exit.PREEMPTED, Exit.OK)
"""Codes that may follow from what another rank met, most telling first; every other code is a cause."""


def announce(folder: Path, rank: int) -> None:
    """Say that a rank began, so that its death without a word can be told from never having lived."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"rank-{rank}.pid.tmp"
    temporary.write_text(str(os.getpid()))
    temporary.replace(folder / f"rank-{rank}.pid")


def signal_rank(folder: Path, rank: int, number: int) -> bool:
    """Send a rank a signal; False when it does not live."""
    path = folder / f"rank-{rank}.pid"
    try:
        os.kill(int(path.read_text()), number)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def leave(folder: Path, result: RankResult) -> None:
    """Write a rank's result, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"rank-{result.rank}.tmp"
    temporary.write_text(result.model_dump_json(by_alias=True, exclude_none=True))
    temporary.replace(folder / f"rank-{result.rank}.json")


def clear(folder: Path) -> None:
    """Forget the results of an earlier process in this pod."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("rank-*"):
        path.unlink()


def gather(folder: Path) -> dict[int, RankResult]:
    """The results that are there, by rank."""
    found = [RankResult.model_validate_json(path.read_text()) for path in folder.glob("rank-*.json")]
    return {result.rank: result for result in found}


def conclude(
    results: dict[int, RankResult], ranks: range, *, signalled: bool, out_of_memory: bool, exit_code: int
) -> RankResult:
    """One ending for the pod: a published artifact wins, then a cause, then a consequence of what others met."""
    published = next((result for result in results.values() if result.ending.artifact is not None), None)
    if published is not None and published.exit is Exit.OK:
        return published
    silent = [rank for rank in ranks if rank not in results]
    if silent:
        results = {**results, silent[0]: _silence(silent[0], signalled, out_of_memory, exit_code)}
    return min(results.values(), key=lambda result: (_weight(result.exit), result.rank))


def _weight(code: Exit) -> int:
    if code not in _CONSEQUENCES:
        return 0
    # A rank that crashed or was killed explains why another one stalled.
    return {Exit.CRASHED: 1, Exit.STALLED: 2, Exit.PREEMPTED: 3, Exit.OK: 4}[code]


def _silence(rank: int, signalled: bool, out_of_memory: bool, exit_code: int) -> RankResult:
    if out_of_memory:
        fault = Fault(Reason.OUT_OF_MEMORY, f"rank {rank} was killed by the kernel: the pod's memory ran out")
    elif signalled:
        fault = Fault(Reason.PREEMPTED, f"rank {rank} was told to leave before it could save a step")
    else:
        fault = Fault(Reason.CRASHED, f"rank {rank} ended without a word (exit code {exit_code})")
    code, ending = ending_of(fault)
    assert EXITS[fault.reason] is code
    return RankResult(rank=rank, exit=code, ending=ending)
