"""The combinations of data fields, as runs without an API server refuse them; tests/api holds the same table there."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import rules

SCRATCH = {"modelType": "llama", "hiddenSize": 16, "layers": 1, "attentionHeads": 1, "tokenizer": {"train": {}}}
STEPS = {"training": {"maxSteps": 5}}
ROWS = {"train": [{"from": {"inline": "{}"}}]}


def _broken(method: str, dataset: dict[str, Any], **fields: Any) -> dict[str, str]:
    document = {"method": method, "model": {"from": {"huggingFace": {"repo": "acme/tiny"}}}, **fields}
    return dict(rules.broken(FineTuneJobSpec.model_validate({**document, "dataset": {**ROWS, **dataset}})))


@pytest.mark.parametrize(
    ("method", "dataset", "field", "said"),
    [
        ("dpo", {"packing": {}}, "packing", "only pretrain and sft"),
        ("dpo", {"paddingFree": True}, "paddingFree", "compare rows"),
        ("dpo", {"ignoreEmptyThink": True}, "ignoreEmptyThink", "judge whole answers"),
        ("dpo", {"streaming": {}}, "streaming", "read their rows before the training"),
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


@pytest.mark.parametrize(
    ("dataset", "fields", "field", "said"),
    [
        ({"streaming": {}}, {}, "training.maxSteps", "nobody knows how many rows a stream has"),
        ({"streaming": {}, "validationSplit": 0.1}, STEPS, "dataset.validationSplit", "rows of their own"),
        (
            {"streaming": {}},
            {"training": {"maxSteps": 5, "groupByLength": True}},
            "training.groupByLength",
            "must be false with dataset.streaming",
        ),
        ({"streaming": {}, "packing": {}}, STEPS, "dataset.packing", "rows that are all there"),
        ({"streaming": {}, "train": [{**ROWS["train"][0], "sample": 3}]}, STEPS, "dataset.train", "leave out sample"),
        (
            {"streaming": {}},
            {**STEPS, "model": {"scratch": SCRATCH}},
            "model.scratch.tokenizer.train",
            "give tokenizer.from",
        ),
        ({"interleave": {"weights": [1, 2]}}, {}, "dataset.interleave.weights", "one weight for each part"),
    ],
)
def test_refused_of_streams_and_mixtures(
    dataset: dict[str, Any], fields: dict[str, Any], field: str, said: str
) -> None:
    assert said in _broken("sft", dataset, **fields)[field]


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [({"streaming": {}}, STEPS), ({"interleave": {"weights": [2]}}, {}), ({"interleave": {}, "streaming": {}}, STEPS)],
)
def test_accepted_of_streams_and_mixtures(dataset: dict[str, Any], fields: dict[str, Any]) -> None:
    assert _broken("sft", dataset, **fields) == {}
