"""The combinations of data fields, as runs without an API server refuse them; tests/api holds the same table there."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import rules

ROWS = {"train": [{"from": {"inline": "{}"}}]}


def _broken(method: str, dataset: dict[str, Any], **fields: Any) -> dict[str, str]:
    document = {"method": method, "model": {"from": {"huggingFace": {"repo": "acme/tiny"}}}, **fields}
    return dict(rules.broken(FineTuneJobSpec.model_validate({**document, "dataset": {**ROWS, **dataset}})))


@pytest.mark.parametrize(
    ("method", "dataset", "field", "said"),
    [
        ("sft", {"packing": {"strategy": "wrapped"}}, "packing.strategy", "must be bfd"),
        ("sft", {"packing": {"strategy": "bfdSplit"}}, "packing.strategy", "must be bfd"),
        ("sft", {"maxLength": 512, "packing": {"length": 256}}, "packing.length", "at least dataset.maxLength"),
    ],
)
def test_refused(method: str, dataset: dict[str, Any], field: str, said: str) -> None:
    found = _broken(method, dataset)
    assert said in found[f"dataset.{field}"]


@pytest.mark.parametrize(
    ("method", "dataset"),
    [
        ("sft", {"packing": {}}),
        ("sft", {"packing": {"length": 4096}}),
        ("pretrain", {"packing": {"strategy": "bfdSplit", "length": 256}}),
        ("pretrain", {"packing": {"strategy": "wrapped", "length": 256}, "paddingFree": True}),
    ],
)
def test_accepted(method: str, dataset: dict[str, Any]) -> None:
    assert _broken(method, dataset) == {}
