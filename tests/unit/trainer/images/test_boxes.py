"""Boxes: what rows may say of them, and how models write them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, run_config, spec
from tests.unit.trainer.images.conftest import painted, run_here
from trimtab_api.conditions import Reason
from trimtab_trainer.data.boxes import Boxes
from trimtab_trainer.data.collecting import PartReader
from trimtab_trainer.data.media import Root
from trimtab_trainer.data.opened import Picture
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods import METHODS
from trimtab_trainer.model import vision
from trimtab_trainer.model.senses import Senses

ASKED = conversation("<image>where is the <ref-object>?", "Here: <bbox>.")
SHEEP = {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8]]}


def standard(objects: Any, row: dict[str, Any] = ASKED, method: str = "sft") -> dict[str, Any]:
    """A row as a method takes it."""
    wanted = spec(method, model={"from": {"fineTuneJob": {"name": "base"}}})
    reader = PartReader(
        wanted.dataset.train[0], METHODS[method].needs(run_config(wanted, Path("/nowhere"))), Root(path=Path("/data"))
    )
    return reader.standard({**row, "images": ["a.png"], "objects": objects}, "rows.jsonl", 3)


def said(row: dict[str, Any], model_type: str) -> list[str]:
    """The texts of a row, its image being 400 pixels high and 300 wide, and seen half as large."""
    write = Boxes(model_type, lambda _: (400, 300), lambda size: (size[0] // 2, size[1] // 2))
    return [message["content"] for message in write(row)["messages"]]


def test_families_write_boxes_in_their_own_ways() -> None:
    row = standard(SHEEP)
    assert said(row, "qwen2_vl") == [
        "<image>where is the <|object_ref_start|>sheep<|object_ref_end|>?",
        "Here: <|box_start|>(303,402),(450,532)<|box_end|>.",
    ]
    assert said(row, "qwen2_5_vl") == ["<image>where is the sheep?", "Here: [45, 80, 68, 106]."]
    point = standard({"ref": ["sheep"], "bbox": [[0.5, 0.25]], "bbox_type": "norm1"})
    assert said(point, "qwen2_vl")[1] == "Here: <|box_start|>(500,250)<|box_end|>."
    plain = standard(None, conversation("<image>what is it?", "A sheep."))
    assert said(plain, "llava") == ["<image>what is it?", "A sheep."]


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ([1], "'objects' must be an object"),
        ({"bbox": SHEEP["bbox"]}, "'objects.ref' is not as many as the messages' 1 <ref-object>"),
        ({**SHEEP, "bbox": []}, "'objects.bbox' is not as many as the messages' 1 <bbox>"),
        ({**SHEEP, "bbox": [[1, 2, 3]]}, "must be [x1, y1, x2, y2] or [x, y]"),
        ({**SHEEP, "bbox": [[5, 5, 5, 9]]}, "second corner is not below and right"),
        ({**SHEEP, "bbox": [[1, 2, 3, 4]], "bbox_type": "norm1"}, "from 0 to 1"),
        ({**SHEEP, "bbox_type": "norm1000"}, "it must be real or norm1"),
        ({**SHEEP, "image_id": [1]}, "'objects.image_id' must be the place"),
    ],
)
def test_what_is_no_box(objects: Any, problem: str) -> None:
    with pytest.raises(Fault) as caught:
        standard(objects)
    assert caught.value.reason is Reason.DATA_INVALID
    assert "rows.jsonl row 3" in caught.value.message
    assert problem in caught.value.message


def test_a_box_lies_on_its_image_and_is_of_a_model_that_writes_some() -> None:
    with pytest.raises(Fault, match=r"does not lie on image /data/a.png, which is 300x400 pixels"):
        said(standard({**SHEEP, "bbox": [[290, 0, 301, 10]]}), "qwen2_vl")
    with pytest.raises(Fault, match="how a llava model writes them is not known"):
        said(standard(SHEEP), "llava")
    with pytest.raises(Fault, match="'objects' is given, and this job does not look at it"):
        standard(SHEEP, {**ASKED, "rejected_response": "Here: <bbox>."}, method="dpo")


@pytest.mark.timeout(300)
def test_what_is_learnt_is_the_box_as_the_model_writes_it(seeing: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    from trimtab_trainer.model import tokenizer

    image = "data:image/png;base64," + base64.b64encode(painted("red", 0)).decode()
    row = {**conversation("<image>where is the <ref-object>?", "<bbox>"), "images": [image]}
    rows = [{**row, "objects": {"ref": ["sheep"], "bbox": [[28, 0, 56, 28]]}}]
    run_here(
        "sft",
        rows,
        tmp_path / "out",
        seeing,
        tuner={"type": "full"},
        dataset={"maxLength": 160},
        training={"maxSteps": 1},
    )
    [path] = (tmp_path / "out-work").rglob("train.arrow")
    [labels] = Dataset.from_file(str(path))["labels"]
    said = tokenizer.load(seeing, "model.from").decode([each for each in labels if each != -100])
    assert said == "<|box_start|>(500,0),(1000,500)<|box_end|><|im_end|>"


def test_what_a_model_sees_of_an_image(seeing: Path) -> None:
    """As its processor resizes it: the number of tokens is that of the patches."""
    from trimtab_trainer.model import tokenizer

    processor = vision.load_processor(seeing, tokenizer.load(seeing, "model.from"), "model.from")
    height, width = vision.resized(processor, (100, 400))
    assert height // 28 * (width // 28) == Senses(processor).text(Picture(100, 400)).count("<|image_pad|>")
