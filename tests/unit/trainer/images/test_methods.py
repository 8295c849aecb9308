"""What each method is for, learnt from images and seen on images that no row shows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.conftest import run_config
from tests.unit.trainer.images.conftest import (
    COLOURS,
    QUESTION,
    SHADES,
    UNSEEN,
    Rows,
    Tune,
    others,
    painted,
    run_config_here,
    see_eyes_alone,
    shown,
)
from trimtab_trainer import yamlfile
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scalar

pytestmark = pytest.mark.timeout(300)

EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "images"
FULL: dict[str, Any] = {"type": "full"}
LORA: dict[str, Any] = {"lora": {"rank": 8, "dropout": 0}}
BOTH = pytest.mark.parametrize("tuner", [FULL, LORA], ids=["full", "lora"])


def opened(base: Path, folder: Path, scored: int = 0) -> tuple[Any, Any]:
    """A published model and its processor, by plain transformers and PEFT; with a head of `scored` numbers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    adapted = (folder / "adapter_config.json").is_file()
    whole = base if adapted else folder
    if scored:
        local = LocalModel(whole, "model", None)
        model: Any = scalar.load(local, "model", torch.float32, labels=scored, seed=5, pad_token_id=0)
    else:
        model = AutoModelForImageTextToText.from_pretrained(whole)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval(), AutoProcessor.from_pretrained(folder)


def batch(processor: Any, colour: str, shade: int, answer: str | None = None) -> Any:
    """The question about an image as a server prepares it, with an answer or before it."""
    from PIL import Image

    image = Image.open(io.BytesIO(painted(colour, shade))).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.removeprefix("<image>")}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text += "" if answer is None else f"{answer}<|im_end|>"
    return processor(text=[text], images=[image], return_tensors="pt")


def share_right(base: Path, folder: Path) -> float:
    """How often the likeliest of the names is the right one, on images that no row shows."""
    model, processor = opened(base, folder)

    def likelihood(colour: str, shade: int, name: str) -> float:
        start = batch(processor, colour, shade)["input_ids"].shape[1]
        whole = batch(processor, colour, shade, name)
        with torch.no_grad():
            said = model(**whole).logits[0, :-1].log_softmax(-1)
        ids = whole["input_ids"][0]
        return float(said[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())

    asked = [(colour, shade) for colour in COLOURS for shade in UNSEEN]
    right = [colour == max(COLOURS, key=lambda name: likelihood(colour, shade, name)) for colour, shade in asked]
    return sum(right) / len(right)


def pairs(shades: Iterable[int] = SHADES) -> Rows:
    """The right name against each of the wrong ones."""
    return [
        {**shown(colour, shade, colour), "rejected_response": other}
        for shade in shades
        for colour in COLOURS
        for other in others(colour)
    ]


def questions(shades: Iterable[int] = SHADES, **columns: str) -> Rows:
    """The question about each image, with columns that are the right name."""
    return [
        {**shown(colour, shade), **{name: value.format(colour) for name, value in columns.items()}}
        for shade in shades
        for colour in COLOURS
    ]


PAIRWISE = [("dpo", FULL), ("dpo", LORA), ("cpo", LORA), ("simpo", LORA), ("orpo", FULL)]


@pytest.mark.parametrize(("method", "tuner"), PAIRWISE, ids=["-".join([name, *tuner]) for name, tuner in PAIRWISE])
@proves("dpo", "images")
@proves("cpo", "images")
@proves("simpo", "images")
@proves("orpo", "images")
def test_the_right_name_is_preferred(method: str, tuner: dict[str, Any], tune: Tune, mistaken: Path) -> None:
    plan = {"maxSteps": 20, "learningRate": 1e-2 if tuner is LORA else 5e-3, "evalSteps": 20}
    done = tune(method, pairs(), *pairs(UNSEEN[:1]), tuner=tuner, training=plan)
    assert done.logged("eval_rewards/accuracies")[-1] == 1
    assert share_right(mistaken, mistaken) < 0.4
    assert share_right(mistaken, done.folder) > 0.9
    see_eyes_alone(mistaken, done.folder)


@BOTH
@proves("kto", "images")
def test_good_and_bad_names_part(tuner: dict[str, Any], tune: Tune, mistaken: Path) -> None:
    rows = [
        {**shown(colour, shade, name), "label": name == colour}
        for shade in SHADES
        for colour in COLOURS
        for name in COLOURS
    ]
    plan = {"maxSteps": 24, "learningRate": 1e-2 if tuner is LORA else 5e-3}
    done = tune("kto", rows, tuner=tuner, training=plan, kto={"desirableWeight": 2})
    assert share_right(mistaken, done.folder) > 0.9
    see_eyes_alone(mistaken, done.folder)


@BOTH
@proves("grpo", "images")
def test_reward_rises(tuner: dict[str, Any], tune: Tune, mistaken: Path) -> None:
    asked = {"rewards": [{"name": "accuracy"}], "numGenerations": 4, "maxCompletionLength": 6, "beta": 0.01}
    plan = {"maxSteps": 20, "perDeviceBatchSize": 24, "learningRate": 1e-2 if tuner is LORA else 5e-3}
    done = tune("grpo", questions(solution="{}"), tuner=tuner, training=plan, grpo=asked)
    rewards = done.logged("reward")
    assert sum(rewards[:2]) / 2 < 0.4
    assert sum(rewards[-4:]) / 4 > 0.7
    assert share_right(mistaken, done.folder) > 0.9
    see_eyes_alone(mistaken, done.folder)


@proves("gkd", "images")
@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["on rows", "on its own answers"])
def test_student_nears_teacher(lmbda: float, tune: Tune, mistaken: Path) -> None:
    """The student says after its teacher what it sees."""
    told = [shown(colour, shade, colour) for shade in SHADES for colour in COLOURS]
    knows = tune("sft", told, name="teacher", tuner=FULL, training={"maxSteps": 20, "learningRate": 5e-3}).folder
    assert share_right(mistaken, knows) > 0.9
    done = tune(
        "gkd",
        told if lmbda == 0 else questions(),
        further={"gkd.teacher.from": knows},
        tuner=LORA,
        gkd={"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "lmbda": lmbda, "maxCompletionLength": 6},
        training={"maxSteps": 30, "learningRate": 1e-2},
    )
    divergences = done.logged("divergence")
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3])
    assert share_right(mistaken, done.folder) > 0.9
    see_eyes_alone(mistaken, done.folder)


@BOTH
@proves("sequenceClassification", "images")
def test_colours_are_told_apart(tuner: dict[str, Any], tune: Tune, mistaken: Path) -> None:
    done = tune(
        "sequenceClassification",
        questions(label="{}"),
        *questions(UNSEEN, label="{}"),
        classification={"labels": list(COLOURS)},
        tuner=tuner,
        training={"maxSteps": 24, "learningRate": 5e-3, "evalSteps": 24},
    )
    assert done.logged("eval_accuracy")[-1] > 0.9
    model, processor = opened(mistaken, done.folder, scored=3)
    with torch.no_grad():
        said = [model(**_asked(processor, colour)).logits[0].argmax() for colour in COLOURS]
    assert [int(each) for each in said] == [0, 1, 2]
    args = json.loads((done.folder / "args.json").read_text())
    assert (args["taskType"], args["labels"]) == ("SEQ_CLS", list(COLOURS))
    see_eyes_alone(mistaken, done.folder)


def _asked(processor: Any, colour: str) -> Any:
    """The question without the beginning of an answer, as a classifier reads it."""
    from PIL import Image

    image = Image.open(io.BytesIO(painted(colour, UNSEEN[0]))).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.removeprefix("<image>")}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return processor(text=[text], images=[image], return_tensors="pt")


@BOTH
@proves("rewardModel", "images")
def test_the_right_name_earns_more(tuner: dict[str, Any], tune: Tune, mistaken: Path) -> None:
    plan = {"maxSteps": 24, "learningRate": 5e-3, "evalSteps": 24}
    done = tune("rewardModel", pairs(), *pairs(UNSEEN), tuner=tuner, training=plan)
    assert done.logged("eval_accuracy")[-1] > 0.9
    see_eyes_alone(mistaken, done.folder)


@proves("reranker", "images")
def test_the_right_name_comes_first(tune: Tune, mistaken: Path) -> None:
    def rows(shades: Iterable[int]) -> Rows:
        asked = [shown(colour, shade) for shade in shades for colour in COLOURS]
        colours = [colour for _ in shades for colour in COLOURS]
        return [
            {**row, "positive": colour, "negative": others(colour)} for row, colour in zip(asked, colours, strict=True)
        ]

    plan = {"maxSteps": 30, "perDeviceBatchSize": 8, "learningRate": 5e-3, "evalSteps": 30}
    done = tune("reranker", rows(SHADES), *rows(UNSEEN), tuner=LORA, reranker={"loss": "listwise"}, training=plan)
    assert done.logged("eval_accuracy")[-1] > 0.9
    see_eyes_alone(mistaken, done.folder)


def answered(folder: Path, step: int) -> tuple[Rows, dict[str, float]]:
    """The lines of predictions.jsonl, and the figures."""
    place = folder / f"predictions/{step:09d}"
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    return lines, json.loads((place / "metrics.json").read_text())["metrics"]


def test_what_is_seen_is_answered(tune: Tune, mistaken: Path) -> None:
    """Before and after a training, and without one."""
    held = [shown(colour, shade, colour) for shade in UNSEEN for colour in COLOURS]
    told = [shown(colour, shade, colour) for shade in SHADES for colour in COLOURS]
    asked = {"generate": {"maxNewTokens": 8, "batchSize": 5}, "atStart": True}
    plan = {"maxSteps": 20, "learningRate": 1e-2}
    done = tune("sft", told, *held, tuner=LORA, training=plan, evaluation=asked)
    _, before = answered(done.output, 0)
    lines, after = answered(done.output, 20)
    assert before["exactMatch"] < 0.4
    assert after["exactMatch"] > 0.9
    assert [line["messages"][-1]["content"] for line in lines] == [QUESTION] * len(held)
    assert all(line["images"][0].startswith("data:image/png;base64,") for line in lines)
    alone = tune(
        "sft",
        [],
        *held,
        name="alone",
        training={"maxSteps": 0},
        dataset={"train": []},
        evaluation={**asked, "rows": 6, "atStart": False},
    )
    assert alone.ending.artifact is not None
    assert alone.ending.artifact.kind == "predictions"
    assert {line["completion"] for line in answered(alone.output, 0)[0]} <= set(COLOURS)


@pytest.mark.parametrize("name", ["dpo", "sequence-classification"])
def test_the_example_runs_as_it_is(name: str, mistaken: Path, tmp_path: Path) -> None:
    _, wanted = yamlfile.read(EXAMPLES / f"{name}.yaml")
    done = run_config_here(run_config(wanted, tmp_path / "out", model=mistaken))
    assert done.ending.artifact is not None
    assert done.ending.artifact.kind == "adapter"
    see_eyes_alone(mistaken, done.folder)
