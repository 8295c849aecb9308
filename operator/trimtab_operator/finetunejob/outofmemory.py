"""What follows when an attempt runs out of memory: fewer rows in a pass and more passes to a step, or the end. Pure.

The global batch stays, so the run goes on from its checkpoint as the run that was asked for; not to the bit, since sums
are taken in another order.
"""

from __future__ import annotations

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.progress import Attempt, ResolvedFineTune
from trimtab_operator.finetunejob import status

BOUND_TO_THE_PASS = frozenset({"kto", "grpo", "embedding"})
"""Methods whose loss is of all rows of one pass together (KTO's reference point, GRPO's groups, in-batch negatives):
with fewer rows it would be another loss."""


def smaller(job: FineTuneJob) -> ResolvedFineTune | None:
    """Half as many rows in a pass and twice as many passes; None when that cannot be, or would be another run."""
    now = status.of(job).resolved
    if now is None or now.per_device_batch_size % 2 or job.spec.method in BOUND_TO_THE_PASS:
        return None
    return now.model_copy(
        update={
            "per_device_batch_size": now.per_device_batch_size // 2,
            "gradient_accumulation_steps": now.gradient_accumulation_steps * 2,
        }
    )


def hopeless(job: FineTuneJob, attempt: Attempt) -> bool:
    """An equal attempt ran out of memory before, and it was given its second chance: the node may have been shared."""
    equal = [each for each in status.of(job).attempts if each.per_device_batch_size == attempt.per_device_batch_size]
    before = [each for each in equal if each.number < attempt.number]
    return any(each.reason == Reason.OUT_OF_MEMORY for each in before)


def told(job: FineTuneJob, lowered: ResolvedFineTune) -> str:
    """What the next attempt does otherwise."""
    before = status.of(job).resolved
    assert before is not None, "nothing is lowered before it was resolved"
    return (
        f"The next attempt takes {_rows(lowered)} in a pass instead of {before.per_device_batch_size} and "
        f"{lowered.gradient_accumulation_steps} passes to a step instead of {before.gradient_accumulation_steps}: the "
        "same global batch, resumed, not bit-exact."
    )


def _rows(resolved: ResolvedFineTune) -> str:
    return "1 row" if resolved.per_device_batch_size == 1 else f"{resolved.per_device_batch_size} rows"


def remedy(job: FineTuneJob) -> str:
    """Why there is no further attempt, and what would fit."""
    resolved = status.of(job).resolved
    why = "Two equal attempts ran out of memory"
    if job.spec.method in BOUND_TO_THE_PASS:
        why += f", and with fewer rows in a pass {job.spec.method} would be another run"
    elif resolved is not None and resolved.per_device_batch_size == 1:
        why += " with a single row in a pass"
    elif resolved is not None:
        why += f", and {resolved.per_device_batch_size} rows in a pass cannot be halved"
    return (
        f"{why}. Apply the job under another name with a shorter dataset.maxLength, more processes or "
        "larger accelerators, or raise pod.resources.limits if it was the pod's own memory."
    )
