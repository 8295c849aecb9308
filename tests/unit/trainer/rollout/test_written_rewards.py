"""Rewards that the user wrote: what a function is given, what is wrong with one, and that the model learns from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import lines, training
from tests.unit.trainer.rollout.conftest import ASKED, job, logged, prompts, run
from trimtab_api import inputs
from trimtab_api.conditions import Reason
from trimtab_api.contract import CodeInput
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_trainer import preflight
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins
from trimtab_trainer.rewards import Said, written
from trimtab_trainer.rewards.written import Written

pytestmark = pytest.mark.timeout(120)

EXAMPLE = Path(__file__).resolve().parents[4] / "examples/methods/rewards.py"
FIELD = "grpo.rewards[0].python"
USER = [{"role": "user", "content": "1+1?"}]
SAID = [
    Said(USER, "2", [5, 1], {"solution": "2"}, "dataset.train[0] rows.jsonl row 1"),
    Said(USER, "four", [6, 7, 1], {"level": 3}, "dataset.train[0] rows.jsonl row 2"),
]


def source(folder: Path, text: str, number: int = 0) -> CodeInput:
    path = folder / "rewards.py"
    path.write_text(text)
    return CodeInput(field=inputs.written_reward(number), reference="configMap://mine/rewards.py", path=str(path))


def opened(folder: Path, text: str) -> Written:
    return Written.open(source(folder, text), "judge", Pins(()))


def test_a_function_gets_what_trl_gives_it(tmp_path: Path) -> None:
    found = opened(tmp_path, "def judge(**given):\n    judge.given = given\n    return [1, None]")
    assert list(found(SAID)) == [1.0, None]
    assert found._function.given == {  # type: ignore[attr-defined]
        "prompts": [USER, USER],
        "completions": [[{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "four"}]],
        "completion_ids": [[5, 1], [6, 7, 1]],
        "solution": ["2", None],
        "level": [None, 3],
    }


def test_a_function_gets_what_it_names_alone(tmp_path: Path) -> None:
    text = (
        "TWO = 2\ndef judge(completions, *, level=None):\n    return [TWO * len(c[0]['content']) for c in completions]"
    )
    assert list(opened(tmp_path, text)(SAID)) == [2.0, 8.0]


def test_functions_of_one_file_share_what_it_holds(tmp_path: Path) -> None:
    counting = "SEEN = []\ndef one(prompts):\n    SEEN.append(1)\n    return [0, 0]\n"
    text = f"{counting}def two(prompts):\n    return [len(SEEN)] * 2"
    file = source(tmp_path, text)
    one, two = (Written.open(file, name, Pins(())) for name in ("one", "two"))
    one(SAID)
    assert list(two(SAID)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def judge(completions:", r"not Python in line 1"),
        ("def judge(completions): return []\n" * 2 + "\0", r"not Python"),
        ("def other(prompts): ...", r"function judge in configMap://mine/rewards.py: no such function .* has other"),
        ("async def judge(prompts): ...", r"no such function at the top of the file, which has none"),
        ("import absent_module\ndef judge(prompts): ...", r"raised ModuleNotFoundError as it was imported: No module"),
        ("def judge(prompts): ...\njudge = 3", r"it is no function once the file has run"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Fault, match=said) as caught:
        opened(tmp_path, text)
    assert caught.value.reason is Reason.SPEC_INVALID


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1]", r"judge gave 1 rewards for 2 answers, at dataset.train\[0\] rows.jsonl row 1"),
        ("return None", r"judge gave a NoneType for 2 answers"),
        ("return (1 for _ in completions)", r"judge gave a generator for 2 answers"),
        ("return [1, float('nan')]", r"judge gave nan, at dataset.train\[0\] rows.jsonl row 2, answer 'four'"),
        ("return [float('-inf'), 1]", r"judge gave -inf, at .* row 1, answer '2'"),
        ("return [1, 'good']", r"judge gave str 'good', which is no number, at .* row 2"),
        ("return [float(c[0]['content']) for c in completions]", r"judge raised ValueError in line 2: .* at .* row 2"),
    ],
)
def test_a_function_that_goes_wrong_is_told_with_the_row(tmp_path: Path, body: str, said: str) -> None:
    judge = opened(tmp_path, f"def judge(completions):\n    {body}")
    with pytest.raises(Fault, match=said) as caught:
        judge(SAID)
    assert caught.value.message.startswith(f"{FIELD} configMap://mine/rewards.py: judge ")
    assert caught.value.reason is Reason.SPEC_INVALID
    assert caught.value.hint


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    file = source(tmp_path, "def judge(prompts): ...")
    pin = PinnedInput(field=FIELD, uri=file.reference, digest="sha256:" + "0" * 64)
    with pytest.raises(Fault, match="was sha256:0000") as caught:
        Written.open(file, "judge", Pins([pin]))
    assert caught.value.reason is Reason.INPUT_CHANGED


def test_the_columns_that_it_cannot_do_without(tmp_path: Path) -> None:
    text = "def judge(prompts, completions, solution, level=1, *, unit, place=None, **columns): ..."
    assert written.look(source(tmp_path, text), "judge").columns == {"solution", "unit"}


def _job(base: Path, output: Path, rows: str, function: str = "close", text: str | None = None, **fields: Any) -> Any:
    """A job whose one reward is a function of this file."""
    output.mkdir(parents=True)
    file = source(output, EXAMPLE.read_text() if text is None else text)
    reward = {"python": {"configMapKeyRef": {"name": "mine", "key": "rewards.py"}, "function": function}}
    grpo = {"rewards": [reward], "numGenerations": 4, "maxCompletionLength": 6, "beta": 0.01}
    data = {"train": [{"from": {"inline": rows}}], "maxLength": 48}
    plan = training(maxSteps=16, perDeviceBatchSize=24, gradientAccumulationSteps=1, learningRate=2e-3)
    config = job(
        "grpo", base, output / "out", dataset=data, tuner={"type": "full"}, grpo=grpo, **{"training": plan, **fields}
    )
    return config.model_copy(update={"code": [file]})


def test_the_preflight_reads_the_file_and_runs_none_of_it(base: Path, tmp_path: Path) -> None:
    text = "raise SystemExit('run')\ndef close(completions, solution): ..."
    found = preflight.check(_job(base, tmp_path / "a", prompts(), text=text), tmp_path / "look-a")
    (pin,) = [pin for pin in found.pins if pin.field == FIELD]
    assert pin.uri == "configMap://mine/rewards.py"
    assert pin.digest is not None
    bare = lines([{"messages": [{"role": "user", "content": asked}]} for asked in ASKED])
    with pytest.raises(Fault, match="row 1: 'solution' is not there, and a reward of this job reads it"):
        preflight.check(_job(base, tmp_path / "b", bare, text=text), tmp_path / "look-b")


KIND = "def kind(completions, **_):\n    return [c[0]['content'].strip() == 'no' for c in completions]\n"


@proves("grpo", "full")
def test_the_model_learns_from_a_function(base: Path, tmp_path: Path) -> None:
    config = _job(base, tmp_path / "run", prompts(), "kind", KIND)
    pin = PinnedInput(field=FIELD, uri="configMap://mine/rewards.py", digest=None)
    run(config.model_copy(update={"pins": [pin]}))
    output = tmp_path / "run/out"
    rewards = logged(output, "reward")
    assert sum(rewards[:2]) / 2 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.9
    assert logged(output, "rewards/kind/mean") == rewards
    assert json.loads((output / "artifact/args.json").read_text())["inputs"] == [pin.dump()]


def test_a_function_that_goes_wrong_ends_the_run(base: Path, tmp_path: Path) -> None:
    text = "def kind(completions):\n    raise KeyError('weights')\n"
    with pytest.raises(Fault, match=r"kind raised KeyError in line 2: 'weights', at dataset\.train\[0\] inline row \d"):
        run(_job(base, tmp_path / "run", prompts(), "kind", text))


def test_the_example_s_functions(tmp_path: Path) -> None:
    file = source(tmp_path, EXAMPLE.read_text())
    said = [Said(USER, text, [1] * 10, {"solution": "2"}) for text in ("It is 2", "It is 4", "two", "")]
    assert list(Written.open(file, "close", Pins(()))(said)) == pytest.approx([1, 1 / 3, 0, 0])
    assert list(Written.open(file, "brief", Pins(()))(said)) == pytest.approx([-0.1] * 4)
