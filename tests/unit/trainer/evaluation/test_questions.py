"""Validation rows as questions: the prompt is what a server renders, and the answer what the template writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, lines, run_config, spec
from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Collected, collect
from trimtab_trainer.data.media import Root
from trimtab_trainer.data.opened import Media, Medium, Picture
from trimtab_trainer.data.seen import Standing
from trimtab_trainer.endings import Fault
from trimtab_trainer.evaluation import answering, questions
from trimtab_trainer.evaluation.questions import Question
from trimtab_trainer.inputs import Pins, fetch_data
from trimtab_trainer.methods import METHODS
from trimtab_trainer.template import ChatTemplate, asked_for

STOP = ord("|")
"""Ends an answer for the tokenizer of these tests, which has one token for each character."""
TEMPLATE = (
    "{%- for message in messages -%}{{ message.role[0] }}:{{ message.content }}"
    "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}|{%- endfor -%}"
    "{%- if add_generation_prompt %}a:{% endif -%}"
)


class Characters:
    """A tokenizer with one token for each character; ~ is special."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(each) for each in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids)).replace("~", "")


def made(
    tmp_path: Path, method: str, held: list[dict[str, Any]], evaluation: dict[str, Any] | None = None, **dataset: Any
) -> tuple[Collected, RunConfig]:
    inline = lines(held)
    rows = {"train": [{"from": {"inline": inline}}], "validation": [{"from": {"inline": inline}}], "maxLength": 40}
    more = {"grpo": {"grpo": {"rewards": [{"name": "accuracy"}], "numGenerations": 4}}}.get(method, {})
    model = {"from": {"fineTuneJob": {"name": "base"}}}
    wanted = spec(method, model=model, dataset={**rows, **dataset}, evaluation=evaluation or {}, **more)
    config = run_config(wanted, tmp_path / "out")
    pins = Pins(())
    parts = [
        [fetch_data(source, tmp_path / f"{name}-{i}", pins) for i, source in enumerate(found)]
        for name, found in (("train", config.train), ("held", config.validation))
    ]
    needs = METHODS[method].needs(config)
    return collect(parts[0], parts[1], wanted.dataset, needs, tmp_path / "rows"), config


def asked(tmp_path: Path, *arguments: Any, **dataset: Any) -> list[Question]:
    collected, config = made(tmp_path, *arguments, **dataset)
    render = ChatTemplate.of(None, TEMPLATE, config.spec.template.system, {}).renderer()
    path = tmp_path / "questions.jsonl"
    count = questions.write(collected, config, Characters(), render, [STOP], path)
    found = questions.read(path)
    assert len(found) == count
    return found


def text(question: Question) -> str:
    return "".join(map(chr, question.prompt))


def test_a_conversation_is_asked_for_its_last_answer(tmp_path: Path) -> None:
    [found] = asked(tmp_path, "sft", [conversation("hi", "ho", "and?", " ~yes ", system="kind")])
    assert text(found) == "s:kind|u:hi|a:ho|u:and?|a:"
    assert (found.row, found.reference, found.solution) == (1, "yes", None)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user"]


def test_tool_calls_are_part_of_the_answer(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "tide", "arguments": {}}}
    row = conversation("high?")
    row["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
    [found] = asked(tmp_path, "sft", [row], None)
    assert found.reference is not None
    assert '"tide"' in found.reference


@pytest.mark.parametrize(
    ("method", "row", "reference", "solution"),
    [
        ("dpo", {**conversation("hi", "good"), "rejected_response": "bad"}, "good", None),
        ("kto", {**conversation("hi", "good"), "label": True}, "good", None),
        ("grpo", {"messages": [{"role": "user", "content": "hi"}], "solution": 4}, None, "4"),
        ("grpo", {**conversation("hi", "four"), "solution": "4"}, "four", "4"),
        ("pretrain", conversation("hi", "good"), "good", None),
    ],
)
def test_rows_of_each_kind(
    tmp_path: Path, method: str, row: dict[str, Any], reference: str | None, solution: str | None
) -> None:
    [found] = asked(tmp_path, method, [row])
    assert (text(found), found.reference, found.solution) == ("u:hi|a:", reference, solution)


def test_a_bad_example_is_no_reference(tmp_path: Path) -> None:
    rows = [{**conversation("hi", "good"), "label": True}, {**conversation("ho", "bad"), "label": False}]
    assert [each.reference for each in asked(tmp_path, "kto", rows)] == ["good", None]


ROWS = [conversation(str(index), "ok") for index in range(20)]


def test_some_rows_are_drawn_and_drawn_again(tmp_path: Path) -> None:
    first, again = (asked(tmp_path / name, "sft", ROWS, {"rows": 5}) for name in ("first", "again"))
    other = asked(tmp_path / "other", "sft", ROWS, {"rows": 5}, seed=3)
    assert len(first) == 5
    assert first == again
    assert [each.row for each in first] == sorted(each.row for each in first)
    assert [each.row for each in other] != [each.row for each in first]
    assert [each.messages[0]["content"] for each in first] == [str(each.row - 1) for each in first]
    assert len(asked(tmp_path / "all", "sft", ROWS, {"rows": 500})) == 20


def test_long_prompts_are_cut_or_left_out(tmp_path: Path) -> None:
    rows = [conversation("x" * 60, "ok"), conversation("hi", "ok")]
    assert [each.row for each in asked(tmp_path / "delete", "sft", rows)] == [2]
    first, second = asked(tmp_path / "left", "sft", rows, None, truncation="left")
    assert (text(first), text(second)) == ("x" * 37 + "|a:", "u:hi|a:")
    with pytest.raises(Fault, match="the prompts of all 1 validation rows are longer"):
        asked(tmp_path / "none", "sft", rows[:1], None, truncation="right")


@pytest.mark.parametrize(
    ("method", "rows", "metrics", "part"),
    [
        ("pretrain", [{"text": "calm"}], ["bleu"], "validation row 1: plain text asks nothing"),
        ("kto", [{**conversation("hi", "no"), "label": False}], ["bleu"], "bleu compares with the row's answer"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, method: str, rows: list[dict[str, Any]], metrics: list[str], part: str
) -> None:
    collected, config = made(tmp_path, method, rows, {"metrics": metrics})
    with pytest.raises(Fault, match=part):
        questions.see(collected, config)


def test_what_a_question_shows_is_marked_and_named(tmp_path: Path) -> None:
    """By its name below the rows' folder; the data of a data: URI is left out. It is never cut."""
    data = "data:image/png;base64," + "A" * 4000
    names = [f"{tmp_path}/ships/a.png", data]
    collected, config = made(tmp_path, "sft", [conversation("<image><image>which is larger?", "the first")])
    assert collected.validation is not None
    row = json.loads(collected.validation.read_text())
    collected.validation.write_text(json.dumps({**row, "images": names}) + "\n")
    collected = replace(collected, roots=(Root(path=tmp_path),))
    shown = [Medium("image", Path(name), Picture(2, 2)) for name in names]
    media = Media(shown, {("image", name): number for number, name in enumerate(names)}, "sha256:")
    standing = Standing(media, {"image": "#"}, {"image": ord("#")}, lambda _: "###")
    path = tmp_path / "questions.jsonl"

    def render(messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(
            "#" if part["type"] == "image" else part["text"] for each in messages for part in each["content"]
        )

    questions.write(collected, config, Characters(), render, [STOP], path, standing)
    [found] = questions.read(path)
    assert found.prompt[:6] == [-1, -1, -1, -2, -2, -2]
    assert min(found.prompt[6:]) > 0
    assert found.shown == {"images": ["ships/a.png", data[:40] + "…"]}


def test_nothing_to_compare_with_is_nothing_to_refuse_without_a_metric(tmp_path: Path) -> None:
    collected, config = made(tmp_path, "kto", [{**conversation("hi", "no"), "label": False}], {"metrics": ["format"]})
    questions.see(collected, config)


@pytest.mark.parametrize(("count", "world", "batch"), [(10, 1, 3), (10, 2, 3), (1, 4, 8), (9, 3, 1), (8, 2, 4)])
def test_every_question_is_dealt_once_in_as_many_rounds_for_all(count: int, world: int, batch: int) -> None:
    held = [Question(row, [0] * (row % 4 + 1), [], None, None, None) for row in range(count)]
    dealt = answering.rounds(held, world, batch)
    assert sorted(each.row for chunk in dealt for part in chunk for each in part) == list(range(count))
    assert all(len(chunk) == world and max(map(len, chunk)) <= batch for chunk in dealt)
    lengths = [max(len(each.prompt) for part in chunk for each in part) for chunk in dealt]
    assert lengths == sorted(lengths, reverse=True)
    assert all(chunk[0] for chunk in dealt)


def test_questions_are_json_lines(tmp_path: Path) -> None:
    asked(tmp_path, "sft", [conversation("今", "晚")])
    [line] = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert json.loads(line)["reference"] == "晚"


def test_a_named_template_brings_its_own_marks(tmp_path: Path) -> None:
    collected, config = made(tmp_path, "sft", [conversation("hi", "ho")], None, maxLength=80)
    named = asked_for(config.spec.template.model_copy(update={"name": "qwen3"}))
    render = ChatTemplate.of(None, named, None, {}).renderer()
    questions.write(collected, config, Characters(), render, [ord("\n")], tmp_path / "named")
    [found] = questions.read(tmp_path / "named")
    assert text(found).endswith("<|im_start|>assistant\n")
    assert found.reference is not None
    assert found.reference.startswith("<think>")
