"""Rows: what is sound, what is said of what is not, sampling and splitting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, lines
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput
from trimtab_api.v1alpha1.dataset import DataPart, Dataset
from trimtab_trainer.data import collecting
from trimtab_trainer.data.collecting import Collected, Needs, rows_of
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins, fetch_data

ANSWERS = Needs(answer=True, text_allowed=False)
ANYTHING = Needs(answer=False, text_allowed=True)


def _part(**fields: Any) -> DataPart:
    return DataPart.model_validate({"from": {"volume": {"claimName": "data"}}, **fields})


def _collect(
    path: Path, into: Path, needs: Needs = ANYTHING, part: DataPart | None = None, **dataset: Any
) -> Collected:
    part = part or _part()
    source = DataInput(field="dataset.train[0]", part=part, path=str(path))
    local = fetch_data(source, into / "files", Pins([]))
    wanted = Dataset.model_validate({"train": [part.model_dump(by_alias=True)], **dataset})
    return collecting.collect([local], [], wanted, needs, into)


def _written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SOUND = json.dumps(conversation("q", "a"))


@pytest.mark.parametrize(
    ("name", "content", "row", "said"),
    [
        ("rows.jsonl", SOUND + "\n{broken\n", 2, "not JSON"),
        ("rows.jsonl", SOUND.encode() + b'\n{"text": "\xff"}\n', 2, "not UTF-8"),
        ("rows.jsonl", SOUND + "\n\n[1]\n", 3, "must be a JSON object, is an array"),
        ("rows.jsonl", json.dumps(conversation("q", "a", "again")), 1, "'messages' ends with role user"),
        ("rows.jsonl", '{"messages": []}', 1, "at least one message"),
        ("rows.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', 1, "no message of role user"),
        ("rows.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', 1, "has role 'robot'"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": 1}]}', 1, "no text in 'content'"),
        ("rows.jsonl", json.dumps(conversation("q", " ")), 1, "of role assistant is empty"),
        ("rows.jsonl", '{"messages": ["hello"]}', 1, "must be an object with role and content"),
        ("rows.jsonl", '{"query": "q", "response": ""}', 1, "'response' is empty"),
        ("rows.jsonl", '{"query": "q", "response": "a", "history": [["x"]]}', 1, "'history[0]' must be a pair"),
        ("rows.jsonl", '{"question": "q"}', 1, "columns question fit no format"),
        ("rows.jsonl", '{"text": "only text"}', 1, "plain text has no answers"),
        ("rows.json", f'[{SOUND}, "x"]', 2, "must be a JSON object, is text"),
        ("rows.csv", "query,response\nq,a\nq,a,b\n", 2, "more cells"),
        ("rows.txt", "a line\n", 1, "plain text has no answers"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, name: str, content: str | bytes, row: int, said: str) -> None:
    path = _written(tmp_path / name, content)
    with pytest.raises(Fault) as caught:
        _collect(path, tmp_path / "into", ANSWERS)
    assert caught.value.reason is Reason.DATA_INVALID
    assert caught.value.message.startswith(f"dataset.train[0] volume://data row {row}: ")
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines([conversation("q", "a", system="s")])),
        ("rows.json", json.dumps([conversation("q", "a", system="s")])),
        ("rows.csv", "system,query,response\ns,q,a\n"),
        ("rows.jsonl", lines([{"query": "q", "response": "a", "system": "s"}])),
        (
            "rows.csv",
            'messages\n"' + json.dumps(conversation("q", "a", system="s")["messages"]).replace('"', '""') + '"',
        ),
    ],
)
def test_formats_become_one_form_and_one_digest(tmp_path: Path, name: str, content: str) -> None:
    plain = _collect(_written(tmp_path / "plain.jsonl", lines([conversation("q", "a", system="s")])), tmp_path / "a")
    found = _collect(_written(tmp_path / name, content), tmp_path / "b", ANSWERS)
    assert list(rows_of(found.train)) == [conversation("q", "a", system="s")]
    assert found.conversations
    assert found.digest == plain.digest


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "one"}, {"text": "two"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = _collect(tmp_path / "rows.parquet", tmp_path / "into")
    assert [row["text"] for row in rows_of(found.train)] == ["one", "two"]
    with pytest.raises(Fault, match="not Parquet"):
        _collect(_written(tmp_path / "bad.parquet", "no"), tmp_path / "other")


def test_a_folder_is_read_in_order_and_columns_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _written(tmp_path / "data/b.jsonl", '{"q": "2", "a": "y"}\n')
    _written(tmp_path / "data/a.jsonl", '{"q": "1", "a": "x"}\n')
    _written(tmp_path / "data/notes.md", "passed over")
    part = _part(columns={"q": "query", "a": "response"})
    found = _collect(tmp_path / "data", tmp_path / "into", ANSWERS, part)
    assert [row["messages"][0]["content"] for row in rows_of(found.train)] == ["1", "2"]


def test_no_file_and_no_row_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(Fault) as caught:
        _collect(tmp_path / "data", tmp_path / "into")
    assert caught.value.reason is Reason.OBJECT_MISSING
    with pytest.raises(Fault) as caught:
        _collect(_written(tmp_path / "rows.jsonl", "\n\n"), tmp_path / "other")
    assert caught.value.reason is Reason.DATA_EMPTY


@pytest.mark.parametrize(("available", "wanted"), [(10, 3), (3, 10), (5, 5), (1, 4)])
def test_a_sample_takes_each_row_as_often_as_another(available: int, wanted: int) -> None:
    drawn = collecting.sample(available, wanted, seed=7)
    times = [drawn.count(index) for index in range(available)]
    assert len(drawn) == wanted
    assert max(times) - min(times) <= 1
    assert drawn == collecting.sample(available, wanted, seed=7)


def test_sampling_and_splitting_are_part_of_the_digest(tmp_path: Path) -> None:
    path = _written(tmp_path / "rows.jsonl", lines([{"text": str(number)} for number in range(20)]))
    whole = _collect(path, tmp_path / "a")
    sampled = _collect(path, tmp_path / "b", part=_part(sample=5))
    split = _collect(path, tmp_path / "c", validationSplit=0.25)
    assert (sampled.rows, split.rows, split.validation_rows) == (5, 15, 5)
    assert split.validation is not None
    texts = [row["text"] for path in (split.train, split.validation) for row in rows_of(path)]
    assert sorted(texts, key=int) == [str(number) for number in range(20)]
    assert len({whole.digest, sampled.digest, split.digest}) == 3


def test_a_changed_file_under_a_pin_is_told(tmp_path: Path) -> None:
    path = _written(tmp_path / "rows.jsonl", SOUND)
    source = DataInput(field="dataset.train[0]", part=_part(), path=str(path))
    before = fetch_data(source, tmp_path / "x", Pins([]))
    from trimtab_api.v1alpha1.status import PinnedInput

    pin = PinnedInput(field="dataset.train[0]", uri=str(path), digest=before.digest)
    assert fetch_data(source, tmp_path / "y", Pins([pin])).digest == before.digest
    _written(path, SOUND + "\n" + SOUND)
    with pytest.raises(Fault) as caught:
        fetch_data(source, tmp_path / "z", Pins([pin]))
    assert caught.value.reason is Reason.INPUT_CHANGED
