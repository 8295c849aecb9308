"""Rows of preferences: every way of writing them, what is said of broken ones, and what becomes of long ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, run_config
from tests.unit.trainer.preference.conftest import Judge, job, pairs
from trimtab_api.contract import DataInput, RunConfig
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_trainer import preflight
from trimtab_trainer.data.collecting import Needs, standard_rows
from trimtab_trainer.data.preference import Judgements, Pairs, judgements_needed, pairs_needed, sides
from trimtab_trainer.data.sequences import IGNORED
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins, fetch_data
from trimtab_trainer.model import tokenizer
from trimtab_trainer.template import ChatTemplate

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good one"}
BAD = {"role": "assistant", "content": "bad one"}
PAIR = {"messages": [USER, GOOD], "rejected": [USER, BAD], "answers_from": 1}


def _rows(row: dict[str, Any], needs: Needs, into: Path, form: str = "auto") -> list[dict[str, Any]]:
    part = DataPart.model_validate({"from": {"inline": json.dumps(row)}, "format": form})
    source = DataInput(field="dataset.train[0]", part=part, inline=part.from_.inline)
    return list(standard_rows(fetch_data(source, into, Pins([])), needs))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD], "rejected_response": "bad one"},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"query": "q", "response": "good one", "rejected_response": "bad one"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 1},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
        {"prompt": "q", "chosen": "good one", "rejected": "bad one"},
        {"question": "q", "chosen": "good one", "rejected": "bad one"},
        {"instruction": "q", "input": "", "chosen": "good one", "rejected": "bad one"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good one"},
            "rejected": {"from": "gpt", "value": "bad one"},
        },
    ],
    ids=[
        "response",
        "messages",
        "query",
        "explicit",
        "prompt as text",
        "repeated prompt",
        "implicit",
        "as JSON text",
        "texts",
        "question",
        "alpaca",
        "sharegpt",
    ],
)
def test_every_way_of_writing_a_pair_is_one_row(row: dict[str, Any], tmp_path: Path) -> None:
    for needs in (pairs_needed(), judgements_needed()):
        assert _rows(row, needs, tmp_path / str(id(needs))) == [PAIR]


def test_pairs_of_texts(tmp_path: Path) -> None:
    explicit = {"prompt": "the sky is", "chosen": " blue", "rejected": " black"}
    implicit = {"chosen": "the sky is blue", "rejected": "the sky is black"}
    for row, form in ((explicit, "text"), (implicit, "text"), (implicit, "auto")):
        [found] = _rows(row, pairs_needed(), tmp_path / f"{len(row)}-{form}", form)
        assert (found["text"], found["rejected"]) == ("the sky is blue", "the sky is black")
        # The beginning of a word is never cut off it.
        assert found["text"][found["answers_from"] :].strip() == "blue"


def test_a_system_prompt_stands_before_both(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    want = {"messages": [system, USER, GOOD], "rejected": [system, USER, BAD], "answers_from": 2}
    rows = (
        {"system": "be brief", "messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"system": "be brief", "prompt": "q", "chosen": "good one", "rejected": "bad one"},
    )
    for place, row in enumerate(rows):
        assert _rows(row, pairs_needed(), tmp_path / str(place)) == [want]
    row = {"system": "be brief", "prompt": [USER], "completion": [GOOD, USER, GOOD], "label": False}
    [judged] = _rows(row, judgements_needed(), tmp_path / "judged")
    assert (judged["messages"][judged["answers_from"]], judged["answers_from"]) == (GOOD, 2)


def test_a_conversation_may_part_earlier(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "42"}
    row = {
        "messages": [USER, GOOD, tool, GOOD],
        "rejected_messages": [USER, BAD, tool, BAD],
        "tools": [{"function": {"name": "t"}}],
    }
    [found] = _rows(row, pairs_needed(), tmp_path)
    assert found["answers_from"] == 1
    assert [side["messages"][1] for side in sides(found)] == [GOOD, BAD]
    assert all(side["tools"] == row["tools"] for side in sides(found))


@pytest.mark.parametrize("label", [True, 1, "true", "True", " 1"])
def test_labels(label: Any, tmp_path: Path) -> None:
    [found] = _rows({"messages": [USER, GOOD], "label": label}, judgements_needed(), tmp_path / "a")
    assert (found["label"], found["answers_from"]) == (True, 1)
    row = {"prompt": [USER], "completion": [GOOD], "label": label}
    assert _rows(row, judgements_needed(), tmp_path / "b") == [found]
    row = {"prompt": "q", "completion": "good one", "label": label}
    assert _rows(row, judgements_needed(), tmp_path / "d") == [found]
    texts = {"prompt": "q: ", "completion": "a", "label": label in (False, "0")}
    [text] = _rows(texts, judgements_needed(), tmp_path / "c", "text")
    assert text == {"text": "q: a", "answers_from": 3, "label": False}


BROKEN = [
    ({"messages": [USER, GOOD]}, "nothing to compare it with"),
    ({"text": "plain"}, "without an answer to compare with"),
    ({"messages": [USER, GOOD], "rejected_response": "good one"}, "both answers are the same"),
    ({"messages": [USER, GOOD], "rejected_response": " "}, "'rejected_response' is empty"),
    ({"messages": [USER, GOOD], "rejected_messages": [USER]}, "'rejected_messages' ends with role user"),
    ({"messages": [USER, GOOD], "rejected_messages": [{"role": "robot"}]}, "'rejected_messages[0]' has role 'robot'"),
    (
        {"messages": [USER, GOOD], "rejected_messages": [{**USER, "content": "x"}, BAD]},
        "differs first in message 0, of role user",
    ),
    ({"messages": [USER, GOOD], "rejected_messages": [USER, GOOD, USER, BAD]}, "one conversation is the beginning"),
    ({"chosen": "yes", "rejected": [USER, BAD]}, "both texts or both lists"),
    ({"messages": [USER, {**GOOD, "weight": 2}], "rejected_response": "b"}, "a message has a weight"),
    ({"chosen": "yes", "rejected": "no"}, "no common beginning"),
    ({"prompt": "is it? ", "chosen": "yes", "rejected": ""}, "'rejected_response' is empty"),
    ({"chosen": "is it? yes", "rejected": "is it? "}, "one of the two answers is empty"),
]


@pytest.mark.parametrize(("row", "said"), BROKEN, ids=[said[:30] for _, said in BROKEN])
def test_broken_pairs(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Fault) as caught:
        _rows(row, pairs_needed(), tmp_path)
    assert "dataset.train[0]" in caught.value.message
    assert "row 1" in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, GOOD]}, "has no 'label'"),
        ({"messages": [USER, GOOD], "label": "maybe"}, "'label' is 'maybe'"),
        ({"text": "plain", "label": True}, "does not tell where the answer begins"),
        ({"prompt": "q", "completion": " ", "label": True}, "'completion' is empty"),
        ({"messages": [USER, {**GOOD, "weight": 2}], "label": True}, "a message has a weight"),
    ],
)
def test_broken_judgements(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="row 1") as caught:
        _rows(row, judgements_needed(), tmp_path)
    assert said in caught.value.message


# ------------------------------------------------------------ token ids


def _encoder(base: Path, kind: Any, **dataset: Any) -> tuple[Any, Any]:
    loaded = tokenizer.load(base, "base")
    render = ChatTemplate.of(tokenizer.own_template(loaded), None, None, {}).renderer()
    config: RunConfig = run_config(job("dpo", [{}], dataset=dataset), Path("/nowhere"))
    return kind(config, loaded, render), loaded


def _learnt(loaded: Any, labels: list[int]) -> str:
    return str(loaded.decode([label for label in labels if label != IGNORED]))


def test_the_answers_alone_are_learnt(base: Path, tmp_path: Path) -> None:
    encoder, loaded = _encoder(base, Pairs)
    history = [USER, {"role": "assistant", "content": "we sail", "loss": True}, USER]
    rows = [
        *_rows({"messages": [*history, GOOD], "rejected_messages": [*history, BAD]}, pairs_needed(), tmp_path / "a"),
        *_rows({"chosen": "we sail at dawn", "rejected": "we sail at noon"}, pairs_needed(), tmp_path / "b"),
    ]
    talk, text = encoder.encode(rows)
    assert _learnt(loaded, talk["chosen_labels"]) == "good one<|im_end|>"
    assert _learnt(loaded, talk["rejected_labels"]) == "bad one<|im_end|>"
    assert _learnt(loaded, text["rejected_labels"]) == "noon<|endoftext|>"
    assert encoder.conclude().rows == 2


def test_an_agents_answers_are_all_learnt_or_the_last_alone(base: Path, tmp_path: Path) -> None:
    between = {"role": "user", "content": "and?"}
    row = {"messages": [USER, GOOD, between, GOOD], "rejected_messages": [USER, BAD, between, BAD]}
    rows = _rows(row, pairs_needed(), tmp_path)
    every, loaded = _encoder(base, Pairs)
    last, _ = _encoder(base, Pairs, loss="lastTurn")
    assert _learnt(loaded, next(every.encode(rows))["chosen_labels"]) == "good one<|im_end|>" * 2
    assert _learnt(loaded, next(last.encode(rows))["chosen_labels"]) == "good one<|im_end|>"


def test_long_pairs(base: Path, judge: Judge) -> None:
    """Both sides are cut alike, never into what is compared, or the pair goes."""
    longer = {"messages": [*pairs(judge, 1)[0]["messages"][:1], {"role": "assistant", "content": "a " * 30}]}
    pair = {**longer, "rejected": [*longer["messages"][:1], BAD], "answers_from": 1}
    whole, loaded = _encoder(base, Pairs)
    [record] = whole.encode([pair])
    size = len(record["chosen_ids"])
    prompt = next(i for i, label in enumerate(record["chosen_labels"]) if label != IGNORED)

    def cut(truncation: str, limit: int) -> list[dict[str, list[int]]]:
        encoder, _ = _encoder(base, Pairs, truncation=truncation, maxLength=limit)
        return list(encoder.encode([pair]))

    assert cut("delete", size - 1) == []
    [left] = cut("left", size - 4)
    assert left["chosen_ids"] == record["chosen_ids"][4:]
    assert left["rejected_ids"] == record["rejected_ids"][4:]
    [least] = cut("left", size - prompt + 1)
    assert _learnt(loaded, least["chosen_labels"]) == _learnt(loaded, record["chosen_labels"])
    assert cut("left", size - prompt) == []
    [right] = cut("right", size - 4)
    assert right["chosen_ids"] == record["chosen_ids"][:-4]
    assert right["rejected_ids"] == record["rejected_ids"]
    assert cut("right", max(8, prompt)) == []


def test_a_pair_is_two_judgements(base: Path) -> None:
    encoder, loaded = _encoder(base, Judgements)
    records = list(encoder.encode([PAIR, {"messages": [USER, BAD], "answers_from": 1, "label": False}]))
    assert [record["label"] for record in records] == [[1], [0], [0]]
    assert [_learnt(loaded, record["labels"])[:3] for record in records] == ["goo", "bad", "bad"]
    assert encoder.conclude().rows == 3


# ------------------------------------------------------------ preflight


def test_the_preflight_renders_both_sides(base: Path, tmp_path: Path, judge: Judge) -> None:
    good = run_config(job("dpo", pairs(judge)), tmp_path / "out", model=base)
    assert "28 rows are sound" in preflight.check(good, tmp_path / "look").message
    bad = run_config(job("kto", [{**PAIR, "label": None}]), tmp_path / "out", model=base)
    with pytest.raises(Fault, match="row 1"):
        preflight.check(bad, tmp_path / "again")


def test_a_reference_of_other_tokens_is_found_before_anything_starts(base: Path, tmp_path: Path, judge: Judge) -> None:
    from trimtab_api.contract import ModelInput

    other = tmp_path / "other"
    tokenizer.learn([conversation("another", "language")], 300, None, None, other)
    for name in ("config.json", "model.safetensors"):
        (other / name).symlink_to(base / name)
    source = ModelInput(field="dpo.refModel", reference="s3://models/other", path=str(other))
    spec = job("dpo", pairs(judge), dpo={"refModel": {"s3": {"uri": "s3://models/other"}}})
    config = run_config(spec, tmp_path / "out", model=base, further=[source])
    with pytest.raises(Fault, match=r"dpo\.refModel s3://models/other: its tokenizer is another"):
        preflight.check(config, tmp_path / "look")
