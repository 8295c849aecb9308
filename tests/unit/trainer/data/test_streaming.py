"""Streams: what each process gets, in which order, and that a place brings the rest back."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import lines
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.feeds import open_feed
from trimtab_trainer.data.streaming import Cursor, Stream, beginning
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins

ANYTHING = Needs(answer=False, text_allowed=True)


class Letters:
    """An encoder that splits a text into pieces of three letters."""

    columns = ("input_ids",)

    def encode(self, rows: list[dict[str, Any]]) -> Any:
        for row in rows:
            for start in range(0, len(row["text"]), 3):
                yield {"input_ids": [row["text"][start : start + 3]]}

    def conclude(self) -> Any:
        raise AssertionError("a stream has no end")


def _numbered(count: int, name: str = "") -> str:
    return lines([{"text": f"{name}{number:03d}" + "abc" * (number % 3)} for number in range(count)])


def _dataset(count: int = 1, **fields: Any) -> Dataset:
    parts = [{"from": {"volume": {"claimName": "d"}}}] * count
    return Dataset.model_validate({"train": parts, "streaming": {"shuffleBuffer": 8}, **fields})


def _stream(folder: Path, texts: list[str], rank: int = 0, world: int = 1, **fields: Any) -> Stream:
    dataset = _dataset(len(texts), **fields)
    feeds = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.jsonl"
        path.write_text(text)
        source = DataInput(field=f"dataset.train[{number}]", part=dataset.train[number], path=str(path))
        feeds.append(open_feed(source, Pins([])))
    return Stream(feeds, dataset, ANYTHING, Letters(), rank, world)


def _take(stream: Stream, count: int) -> list[str]:
    return [record["input_ids"][0] for record in itertools.islice(stream, count)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_each_row_once_and_the_next_is_in_another_order(tmp_path: Path, shuffle: bool) -> None:
    stream = _stream(tmp_path, [_numbered(20)], shuffle=shuffle)
    epoch = 20 + 13 + 6
    records = _take(stream, 2 * epoch)
    first, second = records[:epoch], records[epoch:]
    numbers = [record for record in first if record.isdigit()]
    assert sorted(numbers) == [f"{number:03d}" for number in range(20)]
    assert Counter(first) == Counter(second)
    assert (first != second) is shuffle
    assert (numbers == sorted(numbers)) is not shuffle


def test_the_rows_of_an_epoch_are_spread_over_the_processes(tmp_path: Path) -> None:
    found: list[str] = []
    for rank in range(3):
        stream = _stream(tmp_path, [_numbered(20)], rank, 3)
        own = itertools.takewhile(lambda _, stream=stream: stream.cursor.epoch == 0, stream)
        numbers = [record["input_ids"][0] for record in own]
        found += [record for record in numbers if record.isdigit()]
    assert sorted(found) == [f"{number:03d}" for number in range(20)]


@pytest.mark.parametrize("done", [0, 1, 2, 5, 17, 38, 39, 40, 61, 100])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_place_brings_back_what_follows_it(tmp_path: Path, done: int, mixed: bool) -> None:
    fields: dict[str, Any] = {"interleave": {"weights": [1, 2], "stopping": "allExhausted"}} if mixed else {}
    texts = [_numbered(9, "a"), _numbered(11, "b")] if mixed else [_numbered(20)]
    undisturbed = _take(_stream(tmp_path, texts, 1, 2, **fields), done + 50)
    stopped = _stream(tmp_path, texts, 1, 2, **fields)
    _take(stopped, done)
    again = _stream(tmp_path, texts, 1, 2, **fields)
    again.start = Cursor(**stopped.cursor.dump())
    assert _take(again, 50) == undisturbed[done:]


def test_a_broken_row_ends_a_strict_stream_with_its_number(tmp_path: Path) -> None:
    text = _numbered(30) + "{broken\n" + _numbered(3)
    stream = _stream(tmp_path, [text], shuffle=False)
    assert len(_take(stream, 20)) == 20
    with pytest.raises(Fault, match=r"0\.jsonl row 31: not JSON") as caught:
        _take(stream, 100)
    assert caught.value.reason is Reason.DATA_INVALID


def test_broken_rows_are_passed_over_and_counted(tmp_path: Path) -> None:
    stream = _stream(tmp_path, [_numbered(4) + "{broken\n"], strict=False, shuffle=False)
    records = _take(stream, 12)
    assert [record for record in records if record.isdigit()] == ["000", "001", "002", "003", "000", "001", "002"]
    assert stream.skipped.rows == 1
    assert "row 5: not JSON" in str(stream.skipped.first)


@pytest.mark.parametrize(("text", "rank", "world"), [("\n", 0, 1), (_numbered(1), 1, 2)])
def test_a_pass_that_gives_nothing_is_told(tmp_path: Path, text: str, rank: int, world: int) -> None:
    with pytest.raises(Fault, match="nothing to learn") as caught:
        _take(_stream(tmp_path, [text], rank, world), 1)
    assert caught.value.reason is Reason.DATA_EMPTY


def test_a_beginning_is_looked_at_and_names_the_sources(tmp_path: Path) -> None:
    dataset = _dataset()
    path = tmp_path / "rows.jsonl"
    path.write_text(_numbered(1000))
    source = DataInput(field="dataset.train[0]", part=dataset.train[0], path=str(path))

    def looked_at() -> tuple[int, str]:
        found = beginning([open_feed(source, Pins([]))], [], dataset, ANYTHING, tmp_path)
        return found.rows, found.digest

    before = looked_at()
    assert before[0] == 256
    assert looked_at() == before
    path.write_text(_numbered(1001))
    assert looked_at() != before


def test_memory_holds_one_block(tmp_path: Path) -> None:
    import tracemalloc

    stream = _stream(tmp_path, ["".join(lines([{"text": "x" * 3000}]) for _ in range(3000))])
    tracemalloc.start()
    _take(stream, 2500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
