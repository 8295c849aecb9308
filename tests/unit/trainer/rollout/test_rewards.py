"""The rewards by name against hand-computed values, and the rows that rollouts ask for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import lines, run_config, spec
from tests.unit.trainer.rollout.conftest import job
from trimtab_api.resolve import resolve
from trimtab_trainer import preflight, rewards
from trimtab_trainer.data import collecting, prompts
from trimtab_trainer.data.prompts import Prompts
from trimtab_trainer.data.sequences import write
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalData
from trimtab_trainer.methods import METHODS
from trimtab_trainer.model import tokenizer
from trimtab_trainer.rewards import Said, named
from trimtab_trainer.rollout.order import Rounds
from trimtab_trainer.template import CHATML, ChatTemplate

HUB = {"huggingFace": {"repo": "acme/other"}}


@pytest.mark.parametrize(
    ("text", "solution", "wanted"),
    [
        ("Yes.", "yes", 1),
        ("no", "yes", 0),
        ("It is 4, so 1,024", "1024", 1),
        ("1024 or 5", "1024", 0),
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{3} no, \boxed{{4}}", r"\boxed{{4}}", 1),
        ("<think>7</think><answer> 8 </answer>", "8", 1),
        ("1/0", "2", 0),
    ],
)
def test_accuracy(text: str, solution: str, wanted: float) -> None:
    assert named.accuracy(text, solution) == wanted


def test_other_formulas() -> None:
    assert named.format_("<think>a</think>\n<answer>b</answer>") == 1
    assert named.format_("<think>a</think><answer>b</answer> c") == 0
    assert [named.soft_overlong(tokens, 100) for tokens in (80, 90, 100, 101)] == [0, -0.5, -1, -1]
    assert named.repetition("a b c a b c") == pytest.approx(-0.25)
    assert named.repetition("a b") == 0
    assert [named.cosine(True, tokens, 10) for tokens in (0, 5, 10, 20)] == pytest.approx([1, 0.75, 0.5, 0.5])
    assert [named.cosine(False, tokens, 10) for tokens in (0, 5, 10)] == pytest.approx([-0.5, -0.25, 0])


@pytest.mark.parametrize("name", ["accuracy", "format", "softOverlong", "repetition", "cosine"])
def test_each_name_gives_a_number(name: str) -> None:
    said = Said(messages=[], text="2", ids=[7], columns={"solution": "2"})
    assert rewards.by_name(name, 8)([said, said])[0] is not None


def _collected(tmp_path: Path, method: str, rows: list[dict[str, Any]], **fields: Any) -> collecting.Collected:
    wanted = spec(method, lines(rows), **fields)
    config = run_config(wanted, tmp_path / "out")
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(rows))
    source = config.train[0]
    local = LocalData(source, [path], "rows.jsonl", None)
    return collecting.collect([local], [], wanted.dataset, METHODS[method].needs(config), tmp_path / "rows")


GRPO = {"grpo": {"rewards": [{"name": "accuracy"}], "numGenerations": 2}}
GKD = {"gkd": {"teacher": {"from": HUB}}}
USER = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("method", "rows", "fields", "said"),
    [
        ("grpo", [{"messages": [USER], "solution": "2"}, {"messages": [USER]}], GRPO, "row 2: 'solution' is not there"),
        ("gkd", [{"messages": [USER]}], GKD, "row 1: 'messages' ends with role user"),
        ("grpo", [{"messages": [USER], "solution": "2", "images": ["a.png"]}], GRPO, "row 1: "),
    ],
)
def test_rows_that_are_refused(
    tmp_path: Path, method: str, rows: list[dict[str, Any]], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(Fault, match=said):
        _collected(tmp_path, method, rows, **fields)


def test_prompts_are_what_a_server_is_asked(tmp_path: Path) -> None:
    """An answer at the end is set aside; other columns reach the rewards; long prompts are cut or deleted."""
    answered = {"messages": [USER, {"role": "assistant", "content": "2"}], "solution": "2", "level": 3}
    found = _collected(tmp_path, "grpo", [answered, {"messages": [USER], "solution": "2"}], **GRPO)
    tokenizer.learn(collecting.rows_of(found.train), 300, None, None, tmp_path / "words")
    words = tokenizer.load(tmp_path / "words", "words")
    render = ChatTemplate.of(CHATML, None, None, {}).renderer()
    config = run_config(spec("grpo", "{}", **GRPO), tmp_path / "out")
    encoded = list(Prompts(config, words, render).encode(list(collecting.rows_of(found.train))))
    asked = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert [words.decode(each["prompt"]) for each in encoded] == [asked, asked]
    assert [words.decode(each["answer"]) for each in encoded] == ["2<|im_end|>", ""]
    row = prompts.read_row(encoded[0])
    assert (row.messages, row.columns) == ([USER], {"solution": "2", "level": 3})
    assert row.place == "dataset.train[0] rows.jsonl row 1"
    assert write(found.train, Prompts(config, words, render), tmp_path / "rows.arrow").sequences == 2
    short = config.spec.dataset.model_copy(update={"max_length": 4})
    tight = config.model_copy(update={"spec": config.spec.model_copy(update={"dataset": short})})
    with pytest.raises(Fault, match=r"all 2 prompts are longer than dataset\.maxLength 4"):
        write(found.train, Prompts(tight, words, render), tmp_path / "none.arrow")
    cut = tight.model_copy(update={"resolved": tight.resolved.model_copy(update={"truncation": "left"})})
    assert len(next(Prompts(cut, words, render).encode(list(collecting.rows_of(found.train))))["prompt"]) == 4


def test_rounds_see_every_row_and_come_again() -> None:
    rounds = Rounds(rows=5, prompts=2, copies=2, repeats=3, shuffle=True, seed=1)
    first = list(rounds)
    assert len(first) == len(rounds) == 3 * 2 * 2 * 3
    assert first[:4] == first[4:8] == first[8:12]
    assert first[0] == first[1]
    assert set(first) == set(range(5))
    rounds.set_epoch(1)
    second = list(rounds)
    assert second != first
    assert list(rounds) == second


@pytest.mark.parametrize(
    ("fields", "accumulation", "rate"),
    [
        ({"method": "grpo", **GRPO, "tuner": {"type": "full"}}, 4, 1e-6),
        ({"method": "grpo", "grpo": {**GRPO["grpo"], "numGenerations": 6}}, 6, 1e-5),
        ({"method": "ppo", "ppo": {"rewardModel": {"from": HUB}}}, 4, 1e-5),
        ({"method": "gkd", **GKD}, 4, 1e-4),
    ],
)
def test_what_is_left_open(fields: dict[str, Any], accumulation: int, rate: float) -> None:
    """The accumulation makes whole groups of answers; learning from rewards is slower."""
    method = fields.pop("method")
    resolved = resolve(spec(method, "{}", training={"perDeviceBatchSize": 4}, **fields))
    assert (resolved.gradient_accumulation_steps, resolved.learning_rate) == (accumulation, rate)


def test_further_models_are_named_by_their_fields() -> None:
    from trimtab_api import inputs

    grpo = {"rewards": [{"name": "format"}, {"rewardModel": {"from": HUB}}]}
    wanted = spec("grpo", "{}", grpo=grpo, ppo={"rewardModel": {"from": HUB}}, **GKD)
    fields = [each.field for each in inputs.further(wanted)]
    assert fields == ["grpo.rewards[1].rewardModel.from", "ppo.rewardModel.from", "gkd.teacher.from"]


def test_the_preflight_looks_at_judges_and_teachers(base: Path, judge: Path, tmp_path: Path) -> None:
    ppo = {"ppo": {"rewardModel": {"from": HUB}}}
    question = {"train": [{"from": {"inline": lines([{"messages": [USER]}])}}], "maxLength": 48}

    def look(method: str, field: str, folder: Path, **fields: Any) -> str:
        work = tmp_path / f"{method}-{folder.parent.name}-{folder.name}"
        config = job(method, base, tmp_path / "out", {field: folder}, **fields)
        return preflight.check(config, work).message

    assert "1 rows are sound" in look("ppo", "ppo.rewardModel.from", judge, dataset=question, **ppo)
    with pytest.raises(Fault, match="has no head that gives scores"):
        look("ppo", "ppo.rewardModel.from", base, dataset=question, **ppo)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    assert "1 rows are sound" in look("ppo", "ppo.rewardModel.from", adapter, dataset=question, **ppo)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer.learn([{"text": "other words altogether"}], 280, None, None, other)
    with pytest.raises(Fault, match="its tokenizer is another than the tuned model's"):
        look("gkd", "gkd.teacher.from", other, dataset=question, gkd={"teacher": {"from": HUB}, "lmbda": 1})
