"""sequenceClassification: held-out rows are told apart, and what was published opens in plain libraries."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.matrix import proves
from tests.unit.trainer.heads.conftest import FULL, LORA, NOUNS, Done, Rows, Tune, said
from trimtab_api.contract import ModelInput
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scalar

LABELS = ("ship", "storm", "fog")


def single(count: int, seed: int) -> Rows:
    """Which of three words stands in the text; the label by number or name."""
    draw = random.Random(seed)
    indexes = [draw.randrange(3) for _ in range(count)]
    return [{"query": said(draw, LABELS[i]), "label": LABELS[i] if row % 2 else i} for row, i in enumerate(indexes)]


def multi(count: int, seed: int) -> Rows:
    """Which of three words stand in the text."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        indexes = [i for i in range(3) if draw.random() < 0.5]
        rows.append({"text": said(draw, *(LABELS[i] for i in indexes)), "label": indexes})
    return rows


def graded(count: int, seed: int) -> Rows:
    """How large a part of the text is a word."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        times = draw.randrange(6)
        rows.append({"messages": [{"role": "user", "content": said(draw, *["gale"] * times)}], "label": times / 5})
    return rows


def _ask(done: Done, local: LocalModel, texts: list[str], *, chat: bool) -> torch.Tensor:
    """What plain transformers, and plain PEFT for an adapter, say of texts."""
    text = AutoTokenizer.from_pretrained(done.folder)
    if done.artifact.kind == "adapter":
        labels = json.loads((done.folder / "args.json").read_text())["numLabels"]
        base = AutoModelForSequenceClassification.from_pretrained(local.path, num_labels=labels)
        base.config.pad_token_id = text.pad_token_id
        model: Any = PeftModel.from_pretrained(base, str(done.folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(done.folder)
    rows = [
        text.apply_chat_template([{"role": "user", "content": each}], return_dict=True) if chat else text(each)
        for each in texts
    ]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**text.pad(rows, return_tensors="pt")).logits
    return found


@proves("sequenceClassification", "full", "lora")
@pytest.mark.parametrize("tuner", [FULL, LORA], ids=["full", "lora"])
def test_one_label(tune: Tune, local: LocalModel, tuner: dict[str, Any]) -> None:
    held_out = single(60, 2)
    done = tune(
        "sequenceClassification",
        single(240, 1),
        held_out,
        classification={"labels": list(LABELS)},
        training={"maxSteps": 30, "learningRate": 1e-2},
        **tuner,
    )
    assert done.held_out["accuracy"] > 0.9
    assert done.held_out["f1"] > 0.9
    adapter = tuner is LORA
    assert (done.artifact.kind, done.artifact.task_type) == ("adapter" if adapter else "classifier", "SEQ_CLS")
    assert (done.artifact.base is not None) is adapter
    args = json.loads((done.folder / "args.json").read_text())
    assert (args["taskType"], args["numLabels"], args["labels"]) == ("SEQ_CLS", 3, list(LABELS))
    if not adapter:
        config = json.loads((done.folder / "config.json").read_text())
        assert config["id2label"] == {"0": "ship", "1": "storm", "2": "fog"}
        assert config["problem_type"] == "single_label_classification"
    assert not (done.folder / "generation_config.json").exists()

    texts = [row["query"] for row in held_out]
    plain = _ask(done, local, texts, chat=True)
    names = [row["label"] if isinstance(row["label"], str) else LABELS[row["label"]] for row in held_out]
    assert sum(LABELS[int(i)] == name for i, name in zip(plain.argmax(-1), names, strict=True)) > 54

    published = LocalModel(done.folder, "s3://models/made", None, base=local if adapter else None)
    judge = scalar.open_published(published, "model", torch.float32)
    scores = judge([[{"role": "user", "content": text}] for text in texts])
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5)


def test_several_labels(tune: Tune, local: LocalModel) -> None:
    held_out = multi(60, 2)
    done = tune(
        "sequenceClassification",
        multi(240, 1),
        held_out,
        classification={"numLabels": 3, "problemType": "multiLabel"},
        training={"maxSteps": 60, "learningRate": 5e-3},
        **FULL,
    )
    assert done.held_out["f1"] > 0.95
    assert done.held_out["accuracy"] > 0.85
    plain = _ask(done, local, [row["text"] for row in held_out], chat=False) > 0
    right = sum(plain[i].nonzero().flatten().tolist() == row["label"] for i, row in enumerate(held_out))
    assert right / 60 == pytest.approx(done.held_out["accuracy"])


def test_regression(tune: Tune) -> None:
    done = tune(
        "sequenceClassification",
        graded(240, 1),
        graded(60, 2),
        classification={"problemType": "regression"},
        training={"maxSteps": 60, "learningRate": 5e-3},
        **FULL,
    )
    assert done.held_out["r2"] > 0.8
    assert done.held_out["spearman"] > 0.9


def test_a_classifier_goes_on_from_a_classifier(tune: Tune, local: LocalModel) -> None:
    """Its head is kept: a second run begins where the first one ended."""
    fields: dict[str, Any] = {"classification": {"labels": list(LABELS)}, **FULL}
    first = tune(
        "sequenceClassification",
        single(240, 1),
        name="first",
        training={"maxSteps": 30, "learningRate": 1e-2},
        **fields,
    )
    again = replace(local, path=first.folder)
    second = tune(
        "sequenceClassification",
        single(64, 3),
        name="second",
        base=again.path,
        training={"maxSteps": 2, "learningRate": 1e-5},
        **fields,
    )
    assert second.losses()[0] < 0.5 * first.losses()[0]


def test_an_adapter_goes_on_from_an_adapter(tune: Tune) -> None:
    """Factors and head are kept."""
    fields: dict[str, Any] = {"classification": {"labels": list(LABELS)}}
    rate = {"maxSteps": 30, "learningRate": 1e-2}
    first = tune("sequenceClassification", single(240, 1), name="first", training=rate, **fields, **LORA)
    source = ModelInput(field="tuner.continueFrom", reference="s3://models/first", path=str(first.folder))
    second = tune(
        "sequenceClassification",
        single(64, 3),
        name="second",
        further=[source],
        tuner={"continueFrom": {"fineTuneJob": {"name": "first"}}},
        training={"maxSteps": 2, "learningRate": 1e-5},
        **fields,
    )
    assert second.losses()[0] < 0.5 * first.losses()[0]


def test_accumulated_passes_equal_one(tune: Tune) -> None:
    """The mean over a batch does not depend on how many forward passes it takes."""
    fields: dict[str, Any] = {"classification": {"numLabels": 3}, "dataset": {"shuffle": False}, **FULL}
    rows = [
        {**row, "label": LABELS.index(row["label"]) if isinstance(row["label"], str) else row["label"]}
        for row in single(64, 1)
    ]
    step = {"maxSteps": 3, "learningRate": 1e-3, "maxGradNorm": 0}
    whole = tune("sequenceClassification", rows, name="whole", training={**step, "perDeviceBatchSize": 16}, **fields)
    apart = tune(
        "sequenceClassification",
        rows,
        name="apart",
        training={**step, "perDeviceBatchSize": 4, "gradientAccumulationSteps": 4},
        **fields,
    )
    assert whole.losses() == pytest.approx(apart.losses(), abs=1e-5)


assert set(LABELS) <= set(NOUNS)
