"""reranker: held-out queries put their document first; losses are the published formulas."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.heads.conftest import FULL, LORA, NOUNS, Rows, Tune, said
from trimtab_api.v1alpha1.heads import Reranker
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.methods.judging import ranking_loss
from trimtab_trainer.methods.metrics import ABSENT
from trimtab_trainer.model import scalar

GOOD, BAD = ("calm", "sail"), ("fog", "gale")


def ranked(count: int, seed: int, negatives: int = 3) -> Rows:
    """A document answers when it says something good, whatever the query is."""
    draw, rows = random.Random(seed), []
    for index in range(count):
        query = {"role": "user", "content": said(draw, draw.choice(NOUNS[:4]), length=3)}
        good = said(draw, draw.choice(GOOD), length=5)
        bad = [said(draw, draw.choice(BAD), length=5) for _ in range(negatives - index % 2)]
        if index % 3:
            rows.append({"query": query["content"], "positive": good, "negative": bad})
            continue
        answers = [[{"role": "assistant", "content": text}] for text in (good, *bad)]
        rows.append({"messages": [query], "positive_messages": answers[:1], "negative_messages": answers[1:]})
    return rows


@proves("reranker", "full", "lora")
@pytest.mark.parametrize(
    ("loss", "tuner"), [("pointwise", FULL), ("listwise", LORA)], ids=["pointwise-full", "listwise-lora"]
)
def test_the_answer_comes_first(tune: Tune, local: LocalModel, loss: str, tuner: dict[str, Any]) -> None:
    done = tune(
        "reranker",
        [row for row in ranked(120, 1) if "messages" in row],
        ranked(40, 2)[::3],
        reranker={"loss": loss},
        training={"maxSteps": 40, "learningRate": 5e-3, "perDeviceBatchSize": 8},
        **tuner,
    )
    assert done.held_out["mrr"] > 0.9
    assert done.artifact.kind == ("adapter" if tuner is LORA else "classifier")
    published = LocalModel(done.folder, "s3://models/made", None, base=local if tuner is LORA else None)
    judge = scalar.open_published(published, "model", torch.float32)
    query = {"role": "user", "content": "we saw the rudder"}
    answers = [[query, {"role": "assistant", "content": f"then {word} was in"}] for word in ("calm", "gale")]
    better, worse = judge(answers)[:, 0].tolist()
    assert better > worse


def test_single_documents(tune: Tune) -> None:
    rows = [
        {"query": row["query"], "document": text, "label": label}
        for row in ranked(120, 1)
        if "query" in row
        for text, label in ((row["positive"], 1), (row["negative"][0], 0.0))
    ]
    done = tune("reranker", rows[40:], rows[:40], training={"maxSteps": 30, "learningRate": 1e-2}, **FULL)
    assert done.held_out["accuracy"] > 0.9


def test_losses_are_the_published_formulas() -> None:
    relevance = torch.tensor([[1.0, 0, 0], [1, 0, ABSENT]])
    logits = torch.tensor([0.3, -0.2, 0.9, 1.2, 0.1])
    sigma = logits.sigmoid()
    labels = torch.tensor([1.0, 0, 0, 1, 0])
    point = -(labels * sigma.log() + (1 - labels) * (1 - sigma).log()).mean()
    torch.testing.assert_close(ranking_loss(logits, relevance, Reranker()), point, rtol=0, atol=1e-5)
    warm = (logits / 0.5).exp()
    lists = -((warm[0] / warm[:3].sum()).log() + (warm[3] / warm[3:].sum()).log()) / 2
    asked = Reranker(loss="listwise", temperature=0.5)
    torch.testing.assert_close(ranking_loss(logits, relevance, asked), lists, rtol=0, atol=1e-5)
