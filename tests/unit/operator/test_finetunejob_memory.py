"""Out of memory: half the rows in a pass and the same global batch, or the end with a remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.operator.makers import NOW, Exit, Reason, Story, at, leading, message, terminated
from trimtab_api.contract import Ending, RunConfig
from trimtab_api.resolve import resolve
from trimtab_operator.finetunejob import outofmemory
from trimtab_operator.finetunejob.plan import plan
from trimtab_operator.plan import Plan


def ran_out(rows: int, *before: tuple[str, int], passes: int = 4, **spec: Any) -> Story:
    """An attempt with so many rows in a pass ran out of memory, after others that ended so with so many."""
    training = {"perDeviceBatchSize": 8, "gradientAccumulationSteps": 2}
    story = Story(spec={"training": training, **spec})
    resolved = resolve(story.job().spec, image="registry/trainer@sha256:1", output_uri="s3://bucket/runs/ns/job/u1")
    story.status["resolved"] = {
        **resolved.dump(), "perDeviceBatchSize": rows, "gradientAccumulationSteps": passes,
    }  # fmt: skip
    for number, (reason, size) in enumerate(before, start=1):
        story.attempt(number, endTime=at(-90), reason=reason, perDeviceBatchSize=size)
    story.attempt(len(before) + 1, perDeviceBatchSize=rows)
    ending = Ending(reason=Reason.OUT_OF_MEMORY, message="memory ran out", step=3)
    return story.runs(terminated("pytorch", Exit.OUT_OF_MEMORY, ending))


def batch(decided: Plan) -> tuple[int, int]:
    """Rows in a pass, and passes to a step."""
    assert decided.status is not None
    found = decided.status["resolved"]
    return found["perDeviceBatchSize"], found["gradientAccumulationSteps"]


def test_the_rows_in_a_pass_are_halved_and_the_passes_doubled() -> None:
    decided = plan(ran_out(8, passes=2).seen(), NOW)
    assert leading(decided) == ("Unknown", "Restarting")
    assert batch(decided) == (4, 4)
    assert decided.status is not None
    assert decided.status["resolved"]["globalBatchSize"] == 16
    assert decided.status["failures"] == 0, "what goes on with less repeats nothing"
    for text in (message(decided), decided.events[0].message):
        assert "4 rows in a pass instead of 8 and 4 passes to a step instead of 2" in text
        assert "resumed, not bit-exact" in text


def test_the_next_attempt_is_told_and_every_later_one() -> None:
    lowered = plan(ran_out(8, passes=2).seen(), NOW)
    story = Story(spec={"training": {"perDeviceBatchSize": 8, "gradientAccumulationSteps": 2}})
    story.status = {**(lowered.status or {})}
    story.status["attempts"][-1]["endTime"] = at(-600)
    begun = plan(story.seen(), NOW)
    assert begun.status is not None
    assert begun.status["attempts"][-1]["perDeviceBatchSize"] == 4
    story.status = dict(begun.status)
    made = plan(story.seen(), NOW)
    config = RunConfig.read(json.loads(made.apply[0]["data"]["run.json"]))
    assert (config.resolved.per_device_batch_size, config.resolved.gradient_accumulation_steps) == (4, 4)
    assert config.spec.training.per_device_batch_size == 8, "the spec is the user's"


def test_a_single_row_is_tried_once_more_and_then_ends_the_job_with_a_remedy() -> None:
    again = plan(ran_out(1, ("OutOfMemory", 2), passes=16).seen(), NOW)
    assert leading(again) == ("Unknown", "Restarting"), "the node may have been shared"
    assert batch(again) == (1, 16)
    assert again.status is not None
    assert again.status["failures"] == 1
    over = plan(ran_out(1, ("OutOfMemory", 2), ("Preempted", 1), ("OutOfMemory", 1), passes=16).seen(), NOW)
    assert leading(over) == ("False", "OutOfMemory")
    assert "single row" in message(over)
    assert "dataset.maxLength" in message(over)


def test_an_odd_number_of_rows_is_not_halved() -> None:
    assert batch(plan(ran_out(3).seen(), NOW)) == (3, 4)
    over = plan(ran_out(3, ("OutOfMemory", 3)).seen(), NOW)
    assert leading(over) == ("False", "OutOfMemory")
    assert "3 rows in a pass cannot be halved" in message(over)


def test_who_wants_no_further_attempt_gets_none() -> None:
    decided = plan(ran_out(8, retries={"limit": 0}).seen(), NOW)
    assert leading(decided) == ("False", "OutOfMemory")
    assert "retries.limit (0)" in message(decided)


def test_halving_goes_on_however_few_retries_there_are() -> None:
    story = ran_out(2, ("OutOfMemory", 8), ("OutOfMemory", 4), retries={"limit": 1})
    story.status["failures"] = 1
    assert batch(plan(story.seen(), NOW)) == (1, 8)


@pytest.mark.parametrize("method", sorted(outofmemory.BOUND_TO_THE_PASS))
def test_a_loss_of_all_rows_of_a_pass_keeps_them(method: str) -> None:
    job = ran_out(8).job()
    bound = job.model_copy(update={"spec": job.spec.model_copy(update={"method": method})})
    assert outofmemory.smaller(job) is not None
    assert outofmemory.smaller(bound) is None
    assert method in outofmemory.remedy(bound)
