"""From what changed to the keys that are looked at."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab_api import names
from trimtab_operator.plan import Key
from trimtab_operator.triggers import Dependents, owner, references

BASE = Key("FineTuneJob", "ns", "base")
SWIFT = Key("FineTuneJob", "ns", "swift")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"model": {"from": {"fineTuneJob": {"name": "base"}}}}, [("FineTuneJob", "base")]),
        ({"adapters": [{"from": {"mergeJob": {"name": "m"}}}]}, [("MergeJob", "m")]),
        ({"model": {"from": {"s3": {"uri": "s3://b/k"}}}}, []),
        ({"fineTuneJob": "not a reference"}, []),
        (None, []),
    ],
)
def test_references_are_found_wherever_they_stand(spec: Any, found: list[tuple[str, str]]) -> None:
    assert list(references(spec)) == found


def test_a_resource_wakes_those_that_refer_to_it_until_they_no_longer_do() -> None:
    dependents = Dependents()
    dependents.seen(SWIFT, {"model": {"from": {"fineTuneJob": {"name": "base"}}}})
    assert dependents.of(BASE) == {SWIFT}
    dependents.seen(SWIFT, {"model": {"from": {"s3": {"uri": "s3://b/k"}}}})
    assert dependents.of(BASE) == set()


def test_a_child_leads_to_its_owner_and_a_stranger_to_nobody() -> None:
    labels = names.labels("FineTuneJob", "base", "u1", "trainer", 1)
    assert owner({"metadata": {"namespace": "ns", "labels": labels}}) == BASE
    assert owner({"metadata": {"namespace": "ns", "labels": {names.OWNER_KIND: "Pod", names.OWNER_NAME: "x"}}}) is None
    assert owner({"metadata": {"namespace": "ns"}}) is None
