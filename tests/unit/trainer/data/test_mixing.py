"""Broken rows that are passed over, and parts that are drawn from in turns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, lines
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data import collecting
from trimtab_trainer.data.collecting import Collected, Needs, rows_of
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins, fetch_data

ANYTHING = Needs(answer=False, text_allowed=True)
ANSWERS = Needs(answer=True, text_allowed=False)


def _collect(
    folder: Path, parts: list[str], needs: Needs = ANYTHING, suffix: str = "jsonl", **fields: Any
) -> Collected:
    dataset = Dataset.model_validate({"train": [{"from": {"volume": {"claimName": "d"}}} for _ in parts], **fields})
    local = []
    for number, text in enumerate(parts):
        path = folder / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
        source = DataInput(field=f"dataset.train[{number}]", part=dataset.train[number], path=str(path))
        local.append(fetch_data(source, folder / "files", Pins([])))
    return collecting.collect(local, [], dataset, needs, folder / "into")


SOUND = lines([conversation("q", "a")])


@pytest.mark.parametrize(
    ("suffix", "text", "rows", "skipped", "first"),
    [
        ("jsonl", SOUND + "{broken\n" + SOUND + lines([conversation("q")]), 2, 2, "row 2: not JSON"),
        ("jsonl", '{"text": "\xff"}\n' + SOUND, 1, 1, "row 1: not UTF-8"),
        ("json", "[" + SOUND + ', "x", ' + SOUND + "]", 2, 1, "row 2: must be a JSON object"),
        ("csv", "query,response\nq,a\nq,a,b\nq,a\n", 2, 1, "row 2: more cells"),
    ],
)
def test_broken_rows_are_passed_over_and_counted(
    tmp_path: Path, suffix: str, text: str, rows: int, skipped: int, first: str
) -> None:
    found = _collect(tmp_path / "a", [text], ANSWERS, suffix, strict=False)
    assert (found.rows, found.skipped) == (rows, skipped)
    assert found.first_skipped is not None
    assert first in found.first_skipped
    with pytest.raises(Fault) as caught:
        _collect(tmp_path / "b", [text], ANSWERS, suffix)
    assert caught.value.message == found.first_skipped.replace("/a/", "/b/")


def test_nothing_but_broken_rows_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"no sound row, 2 broken ones; dataset\.train") as caught:
        _collect(tmp_path, ["{\n{\n"], strict=False)
    assert caught.value.reason is Reason.DATA_EMPTY


def _numbered(name: str, count: int) -> str:
    return lines([{"text": f"{name}{number}"} for number in range(count)])


def _texts(found: Collected) -> list[str]:
    return [row["text"] for row in rows_of(found.train)]


def test_parts_are_drawn_from_by_weight_until_the_first_ends(tmp_path: Path) -> None:
    parts = [_numbered("a", 300), _numbered("b", 3000)]
    mixed = {"interleave": {"weights": [1, 3]}}
    texts = _texts(_collect(tmp_path / "a", parts, **mixed))
    counts = Counter(text[0] for text in texts)
    assert counts["a"] == 300
    assert 2.5 < counts["b"] / counts["a"] < 3.5
    assert [text for text in texts if text[0] == "a"] == [f"a{number}" for number in range(300)]
    assert texts == _texts(_collect(tmp_path / "b", parts, **mixed))
    assert texts != _texts(_collect(tmp_path / "c", parts, **mixed, seed=1))


def test_parts_begin_anew_until_each_has_had_its_end(tmp_path: Path) -> None:
    parts = [_numbered("a", 3), _numbered("b", 40)]
    counts = Counter(_texts(_collect(tmp_path, parts, interleave={"stopping": "allExhausted"})))
    assert set(counts) == {f"a{number}" for number in range(3)} | {f"b{number}" for number in range(40)}
    assert max(counts[f"b{number}"] for number in range(40)) == 1
    assert min(counts[f"a{number}"] for number in range(3)) > 5


def test_an_empty_part_cannot_be_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"dataset\.train\[1\].*no row to mix in") as caught:
        _collect(tmp_path, [_numbered("a", 30), "\n"], interleave={"stopping": "allExhausted"})
    assert caught.value.reason is Reason.DATA_EMPTY
