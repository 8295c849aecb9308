"""Every way a run can end, in one table: from an exception to a reason, an exit code, a sentence and a remedy.

Rooms raise Fault where they know what is wrong. What libraries raise is told apart here, by its type alone.
"""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from trimtab_api.conditions import RUNBOOK, Reason
from trimtab_api.contract import Ending, Exit
from trimtab_store.errors import StorageError

log = logging.getLogger(__name__)

EXITS: dict[Reason, Exit] = {
    Reason.SUCCEEDED: Exit.OK,
    Reason.INPUTS_SOUND: Exit.OK,
    Reason.SPEC_INVALID: Exit.SPEC_INVALID,
    Reason.OUTPUT_MISSING: Exit.SPEC_INVALID,
    Reason.BUCKET_MISSING: Exit.SPEC_INVALID,
    Reason.OBJECT_MISSING: Exit.SPEC_INVALID,
    Reason.DATA_INVALID: Exit.DATA_INVALID,
    Reason.DATA_EMPTY: Exit.DATA_INVALID,
    Reason.INPUT_CHANGED: Exit.DATA_INVALID,
    Reason.MODEL_INVALID: Exit.MODEL_INVALID,
    Reason.CHAT_TEMPLATE_MISSING: Exit.MODEL_INVALID,
    Reason.BASE_MISMATCH: Exit.MODEL_INVALID,
    Reason.DIGEST_MISMATCH: Exit.MODEL_INVALID,
    Reason.NOT_AN_ARTIFACT: Exit.MODEL_INVALID,
    Reason.UNSAFE_FORMAT: Exit.MODEL_INVALID,
    Reason.CREDENTIALS_MISSING: Exit.CREDENTIALS,
    Reason.CREDENTIALS_WRONG: Exit.CREDENTIALS,
    Reason.STORAGE_UNREACHABLE: Exit.STORAGE_FAILED,
    Reason.STORAGE_FAILED: Exit.STORAGE_FAILED,
    Reason.DISK_FULL: Exit.DISK_FULL,
    Reason.OUT_OF_MEMORY: Exit.OUT_OF_MEMORY,
    Reason.MEMORY_TOO_SMALL: Exit.OUT_OF_MEMORY,
    Reason.ASSERTION_FAILED: Exit.ASSERTION_FAILED,
    Reason.STALLED: Exit.STALLED,
    Reason.PREEMPTED: Exit.PREEMPTED,
    Reason.ENGINE_FAILED: Exit.CRASHED,
    Reason.CRASHED: Exit.CRASHED,
}
"""The exit code of each reason that a pod of ours can end with."""

_OUT_OF_MEMORY = ("torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError", "builtins.MemoryError")
_STALLED = (
    "torch.distributed.DistError",
    "torch.distributed.DistBackendError",
    "torch.distributed.DistNetworkError",
    "torch.distributed.DistStoreError",
    "torch.distributed.DistQueueEmptyError",
)


class Fault(Exception):
    """An ending that a room foresaw: what is wrong and where, and what to do about it."""

    def __init__(self, reason: Reason, message: str, hint: str | None = None, step: int | None = None):
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint if hint is not None else RUNBOOK[reason].remedy
        self.step = step

    @property
    def exit(self) -> Exit:
        """The exit code that goes with the reason."""
        return EXITS[self.reason]


def ending_of(error: BaseException, step: int | None = None, from_step: int | None = None) -> tuple[Exit, Ending]:
    """What a pod says and exits with when `error` ended it. Logs the traceback of what nobody foresaw."""
    fault = fault_of(error)
    if fault.reason in (Reason.CRASHED, Reason.STALLED, Reason.OUT_OF_MEMORY):
        log.error("ended by %s", "".join(traceback.format_exception(error)))
    reached = fault.step if fault.step is not None else step
    return fault.exit, Ending(
        reason=fault.reason, message=fault.message[:2048], hint=fault.hint[:1024], step=reached, from_step=from_step
    )


def fault_of(error: BaseException) -> Fault:
    """The table: which reason an exception stands for."""
    if isinstance(error, Fault):
        return error
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    names |= {name.replace("torch._C._distributed_c10d.", "torch.distributed.") for name in names}
    if isinstance(error, StorageError):
        return _storage(error)
    if names.intersection(_OUT_OF_MEMORY):
        return Fault(Reason.OUT_OF_MEMORY, f"memory ran out: {_first_line(error)}")
    if names.intersection(_STALLED) or _raised_in_collective(error):
        return Fault(
            Reason.STALLED, f"a collective operation failed, another rank is gone or hangs: {_first_line(error)}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault(Reason.DISK_FULL, f"{error.filename or 'the scratch space'}: {error.strerror}")
    if isinstance(error, ValidationError):
        return Fault(Reason.SPEC_INVALID, _validation(error), "Correct the field that the message names.")
    return Fault(Reason.CRASHED, f"{type(error).__name__}: {_first_line(error)}")


def _storage(error: StorageError) -> Fault:
    return Fault(error.reason, f"{error.uri}: {error.problem}", error.remedy)


def _raised_in_collective(error: BaseException) -> bool:
    """gloo raises a plain RuntimeError; only the frame that called it tells it from others.

    DDP's collectives run within the backward pass, where autograd's engine is the last frame.
    """
    distributed = sys.modules.get("torch.distributed")
    if type(error) is not RuntimeError or distributed is None or not distributed.is_initialized():
        return False
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename).as_posix() if frames else ""
    return any(part in last for part in ("/torch/distributed/", "/torch/autograd/graph.py", "/torch/nn/parallel/"))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:600] if text else type(error).__name__


def _validation(error: ValidationError) -> str:
    parts = [f"{'.'.join(str(step) for step in item['loc']) or error.title}: {item['msg']}" for item in error.errors()]
    return "; ".join(parts[:5])
