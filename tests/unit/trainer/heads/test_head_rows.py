"""What the preflight says of rows that a method with a head cannot learn from: the row's number and the way out."""
# ruff: noqa: E501 - a row of a table is one line

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import lines, run_config, spec
from trimtab_api.conditions import Reason
from trimtab_trainer.data import collecting
from trimtab_trainer.data.collecting import rows_of
from trimtab_trainer.data.rows import Row
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import Pins, fetch_data
from trimtab_trainer.methods import METHODS

ASK = [{"role": "user", "content": "q"}]
TWO = {"numLabels": 2}


def collect(tmp_path: Path, method: str, rows: list[dict[str, Any]], **fields: Any) -> list[Row]:
    """The standard rows of a job."""
    wanted = spec(method, lines(rows), training={"perDeviceBatchSize": 4}, **fields)
    config = run_config(wanted, tmp_path / "out")
    data = [fetch_data(source, tmp_path / "data", Pins([])) for source in config.train]
    found = collecting.collect(data, [], wanted.dataset, METHODS[method].needs(config), tmp_path / "rows")
    return list(rows_of(found.train))


def sound(method: str, fields: Any, spoken: bool) -> dict[str, Any]:
    """A row that the method takes, in columns or in messages."""
    if method == "sequenceClassification":
        asked = fields["classification"]
        numbers = {"multiLabel": [0], "regression": [0.5] * asked.get("numLabels", 1)}
        return {"query": "a", "label": numbers.get(asked.get("problemType"), 0)}
    if spoken:
        return {"messages": ASK, "positive_messages": [ASK]}
    return {
        "embedding": {"anchor": "a", "positive": "b", "negatives": ["c", "d"]},
        "reranker": {"query": "q", "positive": "p", "negative": "n"},
        "rewardModel": {"query": "q", "response": "a", "rejected_response": "b"},
    }[method]


@pytest.mark.parametrize(
    ("method", "fields", "row", "said"),
    [
        ("sequenceClassification", {"classification": TWO}, {"query": "a"}, "has no 'label'"),
        ("sequenceClassification", {"classification": TWO}, {"query": "a", "label": 2}, "'label' is 2; there are 2 labels, 0 to 1"),
        ("sequenceClassification", {"classification": TWO}, {"query": "a", "label": -1}, "'label' is -1; there are 2 labels"),
        ("sequenceClassification", {"classification": TWO}, {"query": "a", "label": 0.5}, "'label' is 0.5; it must be a number from 0 to 1"),
        ("sequenceClassification", {"classification": {"labels": ["x", "y"]}}, {"query": "a", "label": "z"}, "'label' is 'z'; it must be one of x, y"),
        ("sequenceClassification", {"classification": {**TWO, "problemType": "multiLabel"}}, {"query": "a", "label": 1}, "wants a list of labels"),
        ("sequenceClassification", {"classification": {**TWO, "problemType": "multiLabel"}}, {"query": "a", "label": [0, 2]}, "'label' is 2; there are 2 labels"),
        ("sequenceClassification", {"classification": {"problemType": "regression"}}, {"query": "a", "label": "high"}, "regression wants a number"),
        ("sequenceClassification", {"classification": {"problemType": "regression", "numLabels": 2}}, {"query": "a", "label": 1}, "wants a list of 2 numbers"),
        ("embedding", {}, {"response": "a"}, "have no anchor"),
        ("embedding", {}, {"anchor": "a"}, "has nothing that belongs to its anchor"),
        ("embedding", {}, {"sentence1": "a", "sentence2": "b", "score": 1}, "has a score, and infonce learns from texts"),
        ("embedding", {"embedding": {"hardNegatives": 2}}, {"anchor": "a", "positive": "b", "negative": "c"}, "has 1 negatives of embedding.hardNegatives 2"),
        ("embedding", {"embedding": {"loss": "contrastive"}}, {"anchor": "a", "positive": "b"}, "has neither a score nor negatives"),
        ("embedding", {"embedding": {"loss": "contrastive"}}, {"sentence1": "a", "sentence2": "b", "score": 0.5}, "contrastive takes 1 (belong together) or 0"),
        ("embedding", {"embedding": {"loss": "cosineSimilarity"}}, {"sentence1": "a", "sentence2": "b", "score": 5}, "a cosine lies between -1 and 1"),
        ("embedding", {"embedding": {"loss": "cosineSimilarity"}}, {"sentence1": "a", "sentence2": "b", "score": "x"}, "the score is 'x'; it must be a number"),
        ("embedding", {"embedding": {"loss": "cosineSimilarity"}}, {"sentence1": "a", "sentence2": ["b", "c"], "score": 1}, "has one score for several texts"),
        ("embedding", {}, {"anchor": "a", "positive": ["b", " "]}, "'positive[1]' must be text that is not empty"),
        ("embedding", {}, {"messages": [*ASK, {"role": "assistant", "content": "a"}], "positive": "b"}, "'messages' has 2 messages; an embedder reads one text"),
        ("embedding", {}, {"messages": ASK, "positive_messages": ["b"]}, "'positive_messages' must be a list of lists of messages"),
        ("embedding", {}, {"messages": ASK, "positive_messages": [[{"role": "user"}]]}, "has a message without text in 'content'"),
        ("reranker", {}, {"query": "q"}, "has no document that answers its query"),
        ("reranker", {}, {"query": "q", "document": "d"}, "'label' is None; it must be between 0 (no answer) and 1"),
        ("reranker", {}, {"query": "q", "document": ["d", "e"], "label": 1}, "has one label for several documents"),
        ("reranker", {}, {"query": "q", "document": "d", "label": 1, "positive": "p"}, "has both 'document' and positive or negative ones"),
        ("reranker", {"reranker": {"loss": "listwise"}}, {"query": "q", "positive": "p"}, "has no negative document, and listwise compares with them"),
        ("reranker", {"reranker": {"loss": "listwise"}}, {"query": "q", "document": "d", "label": 1}, "has one document, and listwise compares several"),
        ("rewardModel", {}, {"query": "q", "response": "a"}, "nothing to compare it with"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(tmp_path: Path, method: str, fields: Any, row: dict[str, Any], said: str) -> None:
    good = sound(method, fields, "messages" in row)
    with pytest.raises(Fault) as caught:
        collect(tmp_path, method, [good, row], **fields)
    assert caught.value.reason is Reason.DATA_INVALID
    assert "inline row 2: " in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("method", "fields", "row", "wanted"),
    [
        ("sequenceClassification", {"classification": {"labels": ["x", "y"]}}, {"text": "a", "label": "y"}, {"text": "a", "label": [1]}),
        ("sequenceClassification", {"classification": TWO}, {"query": "a", "label": True}, {"messages": [{"role": "user", "content": "a"}], "label": [1]}),
        ("sequenceClassification", {"classification": {"labels": ["x", "y"], "problemType": "multiLabel"}}, {"text": "a", "label": '["y", 0]'}, {"text": "a", "label": [0, 1]}),
        ("sequenceClassification", {"classification": {"problemType": "regression"}}, {"text": "a", "label": "0.5"}, {"text": "a", "label": [0.5]}),
        ("embedding", {}, {"query": "a", "positive": ["b", "c"], "negative_1": "d", "negative_2": "e"}, {"text": "a", "positives": ["b", "c"], "negatives": ["d", "e"]}),
        ("embedding", {"embedding": {"hardNegatives": 1}}, {"messages": [{"role": "user", "content": "a"}], "positive_messages": [[{"role": "user", "content": "b"}]], "negative_messages": [[{"role": "user", "content": "c"}], [{"role": "user", "content": "d"}]]}, {"text": "a", "positives": ["b"], "negatives": ["c"]}),
        ("embedding", {"embedding": {"loss": "contrastive"}}, {"anchor": "a", "positive": "b", "negative": "c"}, {"text": "a", "pairs": [["b", 1.0], ["c", 0.0]]}),
        ("embedding", {"embedding": {"loss": "cosineSimilarity"}}, {"sentence1": "a", "sentence2": "b", "score": "-0.25"}, {"text": "a", "pairs": [["b", -0.25]]}),
        ("reranker", {"reranker": {"maxNegatives": 1}}, {"query": "q", "positive": "p", "negatives": ["n", "m"]}, {"messages": ASK, "groups": [{"documents": [[{"role": "assistant", "content": "p"}], [{"role": "assistant", "content": "n"}]], "scores": [1.0, 0.0]}]}),
        ("reranker", {}, {"query": "q", "document": "d", "label": 0.25}, {"messages": ASK, "groups": [{"documents": [[{"role": "assistant", "content": "d"}]], "scores": [0.25]}]}),
    ],
)  # fmt: skip
def test_ways_to_write_a_row(tmp_path: Path, method: str, fields: Any, row: dict[str, Any], wanted: Row) -> None:
    assert json.dumps(collect(tmp_path, method, [row], **fields), sort_keys=True) == json.dumps(
        [wanted], sort_keys=True
    )
