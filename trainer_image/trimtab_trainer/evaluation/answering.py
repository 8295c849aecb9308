"""Questions dealt out to the processes, round by round, and answered. Between two rounds a run can be told to leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.distributed import Group
from trimtab_trainer.endings import Fault
from trimtab_trainer.evaluation.questions import Question
from trimtab_trainer.notice import Notice
from trimtab_trainer.rollout.engine import Engine


@dataclass(frozen=True)
class Answers:
    """What the model said, by row."""

    tokens: dict[int, list[int]]
    """Token ids of each answer, the one that ended it included."""


def rounds(questions: Sequence[Question], world: int, batch: int) -> list[list[list[Question]]]:
    """Questions by round and rank, the longest first: what does not fit memory shows at once, and little is padding."""
    ordered = sorted(questions, key=lambda each: (-len(each.prompt), each.row))
    size = world * batch
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [[chunk[rank::world] for rank in range(world)] for chunk in chunks]


def answer(
    engine: Engine,
    questions: Sequence[Question],
    batch: int,
    seed: int,
    group: Group,
    notice: Notice,
    tell: Callable[[int], None],
) -> Answers:
    """The answers to all questions, on every process. `tell` is told after each round how many there are.

    The random state of the process is afterwards what it was before. Raises Fault(Preempted) when one of the processes
    was told to leave.
    """
    place = group.place
    mine: dict[int, list[int]] = {}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    done = 0
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + place.rank)
        for dealt in rounds(questions, place.world, batch):
            if group.any(notice.given):
                raise Fault(Reason.PREEMPTED, f"told to leave after {done} of {len(questions)} rows were answered")
            own = dealt[place.rank]
            # Who has no question left in the last round answers another's: forward passes may be ones of all.
            said = engine.generate([each.prompt for each in own or dealt[0][:1]]).answers
            mine |= {each.row: ids for each, ids in zip(own, said, strict=False)}
            done += sum(map(len, dealt))
            tell(done)
    return Answers({row: ids for found in group.all_of(mine) for row, ids in found.items()})
