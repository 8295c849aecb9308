"""The methods that learn from preferences, proved by what they are for: a held-out order turns round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation
from tests.unit.trainer.preference.conftest import PLACES, PROMPT, Judge, Tune, job, pairs
from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput
from trimtab_api.v1alpha1.source import ModelSource
from trimtab_trainer import yamlfile
from trimtab_trainer.endings import Fault

EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "methods"
PAIRWISE = ("dpo", "cpo", "simpo", "orpo")
TUNERS = ("full", "lora")


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("method", PAIRWISE)
@proves("dpo", "full", "lora")
@proves("cpo", "full", "lora")
@proves("simpo", "full", "lora")
@proves("orpo", "full", "lora")
def test_the_order_turns_round_on_rows_that_nobody_saw(method: str, tuner: str, tune: Tune, judge: Judge) -> None:
    before = judge.of()
    ending = tune(job(method, pairs(judge), tuner, dataset={"validationSplit": 0.2}, steps={"evalSteps": 4}))
    after = judge.of(tune.artifact())
    assert all(good < bad for good, bad in zip(*before, strict=True))
    assert all(good > bad for good, bad in zip(*after, strict=True))
    assert ending.artifact is not None
    assert ending.artifact.kind == ("model" if tuner == "full" else "adapter")
    history = tune.history()
    margins = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    evaluated = [entry for entry in history if "eval_rewards/margins" in entry]
    assert margins[-1] > margins[0]
    assert evaluated[-1]["eval_rewards/margins"] > margins[0]
    assert evaluated[-1]["eval_rewards/accuracies"] == 1


def judgements(judge: Judge, count: int = 28) -> list[dict[str, Any]]:
    """Rows of good and bad answers, in no order that pairs them."""
    answers = ((judge.chosen, True), (judge.rejected, False))
    seen = PLACES[:-3]
    return [
        {**conversation(PROMPT.format(seen[i % len(seen)]), answers[i % 2][0]), "label": answers[i % 2][1]}
        for i in range(count)
    ]


@pytest.mark.parametrize("tuner", TUNERS)
@proves("kto", "full", "lora")
def test_good_and_bad_answers_part(tuner: str, tune: Tune, judge: Judge) -> None:
    """kto, from labels; what is good becomes likelier than it was, what is bad less likely."""
    before = judge.of()
    tune(
        job("kto", judgements(judge), tuner, dataset={"validationSplit": 0.2}, steps={"evalSteps": 12, "maxSteps": 12})
    )
    after = judge.of(tune.artifact())
    assert all(new > old for old, new in zip(before[0], after[0], strict=True))
    assert all(new < old for old, new in zip(before[1], after[1], strict=True))
    last = next(entry for entry in reversed(tune.history()) if "eval_rewards/chosen" in entry)
    assert last["eval_rewards/chosen"] > 0 > last["eval_rewards/rejected"]


def test_pairs_are_taken_apart_for_kto(tune: Tune, judge: Judge) -> None:
    weights = {"beta": 0.5, "desirableWeight": 1.3, "undesirableWeight": 1}
    before = judge.of()
    tune(job("kto", pairs(judge), kto=weights, steps={"maxSteps": 12}))
    after = judge.of(tune.artifact())
    gained = sum(after[0]) - sum(before[0]) - sum(after[1]) + sum(before[1])
    assert gained > 0
    assert any("rewards/margins" in entry and entry["rewards/margins"] > 0 for entry in tune.history())


RESUMED = [
    ("dpo", "full", {}),
    ("dpo", "lora", {"dpo": {"precomputeRefLogProbs": True}}),
    ("simpo", "lora", {}),
    ("kto", "lora", {}),
]


@proves("dpo", "resume")
@proves("simpo", "resume")
@proves("kto", "resume")
@pytest.mark.parametrize(("method", "tuner", "knobs"), RESUMED, ids=[f"{each[0]}-{each[1]}" for each in RESUMED])
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(
    method: str, tuner: str, knobs: dict[str, Any], tune: Tune, judge: Judge
) -> None:
    spec = job(method, pairs(judge), tuner, steps={"maxSteps": 8, "loggingSteps": 3}, **knobs)
    tune(spec, "undisturbed")
    with pytest.raises(Fault) as left:
        tune(spec, "disturbed", leave_at=3)
    assert (left.value.reason, left.value.step) == (Reason.PREEMPTED, 4)
    ending = tune(spec, "disturbed")
    assert ending.from_step == 4
    assert _course(tune.history("disturbed")) == _course(tune.history("undisturbed"))


def _course(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged of the steps: losses, margins and all."""
    return [entry for entry in history if "loss" in entry]


def test_another_reference(tune: Tune, judge: Judge, base: Path) -> None:
    """A run may be held against another model, full or as an adapter; the first margin is then not zero."""
    tune(job("orpo", pairs(judge), "full"), "other")
    other = ModelInput(field="dpo.refModel", reference="fineTuneJob/other", path=str(tune.artifact("other")))
    knobs = {"refModel": {"fineTuneJob": {"name": "other"}}}
    for tuner in TUNERS:
        tune(job("dpo", pairs(judge), tuner, dpo=knobs, steps={"maxSteps": 2}), tuner, further=[other])
        tune(job("dpo", pairs(judge), tuner, steps={"maxSteps": 2}), f"{tuner}-own")
        assert tune.history(f"{tuner}-own")[0]["rewards/margins"] == 0
        assert tune.history(tuner)[0]["rewards/margins"] < -0.1
    once = {**knobs, "precomputeRefLogProbs": True}
    tune(job("dpo", pairs(judge), dpo=once, steps={"maxSteps": 2}), "once", further=[other])
    assert tune.history("once")[0]["loss"] == pytest.approx(tune.history("lora")[0]["loss"], abs=1e-6)


def test_the_reference_is_waited_for_like_any_model() -> None:
    from trimtab_api.inputs import named

    knobs = {"refModel": {"fineTuneJob": {"name": "other"}}}
    found = {each.field: each.source for each in named(job("dpo", [{}], dpo=knobs))}
    assert found["dpo.refModel"] == ModelSource.model_validate(knobs["refModel"])


@pytest.mark.parametrize("method", [*PAIRWISE, "kto"])
def test_the_example_runs_as_it_is(method: str, tune: Tune, base: Path) -> None:
    _, spec = yamlfile.read(EXAMPLES / f"{method}.yaml")
    ending = tune(spec)
    assert ending.rows == 4
    assert ending.artifact is not None
    assert ending.artifact.kind == "adapter"


@pytest.mark.parametrize("start", ["continueFrom", "adapters", "pissa"])
def test_the_reference_is_the_model_as_it_was(start: str, tune: Tune, judge: Judge) -> None:
    """Also when it began with adapters, or with factors taken out of its base: no margin at first, resumed or not."""
    further = []
    tuner: dict[str, Any] = {"type": "lora", "lora": {"initWeights": "pissa"}}
    if start != "pissa":
        tune(job("orpo", pairs(judge)), "first")
        field = "tuner.continueFrom" if start == "continueFrom" else "tuner.adapters[0].from"
        further = [ModelInput(field=field, reference="fineTuneJob/first", path=str(tune.artifact("first")))]
        source = {"fineTuneJob": {"name": "first"}}
        tuner = {"continueFrom": source} if start == "continueFrom" else {"adapters": [{"from": source}]}
    spec = job("dpo", pairs(judge), steps={"maxSteps": 8, "loggingSteps": 3}, tuner=tuner)
    tune(spec, "undisturbed", further=further)
    with pytest.raises(Fault, match="told to leave"):
        tune(spec, "disturbed", leave_at=3, further=further)
    tune(spec, "disturbed", further=further)
    course = _course(tune.history("disturbed"))
    assert course == _course(tune.history("undisturbed"))
    assert abs(course[0]["rewards/margins"]) < 1e-6
    assert course[-1]["rewards/margins"] > 0.005
    assert not (tune.artifact("disturbed") / "ref").exists()
