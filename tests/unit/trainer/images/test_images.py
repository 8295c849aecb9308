"""Tuning on conversations that show images: what is learnt is what is seen, and broken images are named."""

from __future__ import annotations

import base64
import fnmatch
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.conftest import StartRanks, conversation, history, lines, run_config, spec, training
from tests.unit.trainer.images.conftest import COLOURS, QUESTION, painted
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput, Exit
from trimtab_trainer import preflight, yamlfile
from trimtab_trainer.data.collecting import PartReader
from trimtab_trainer.data.media import Root, attached, tagged
from trimtab_trainer.data.opened import Media, Named, Picture, gather
from trimtab_trainer.data.rows import KINDS
from trimtab_trainer.data.seen import Seen, Standing, spacious
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import SMALL_MODEL_FILES
from trimtab_trainer.methods import METHODS, needs_of
from trimtab_trainer.model import tokenizer, vision
from trimtab_trainer.model.senses import Senses
from trimtab_trainer.template import ChatTemplate

EXAMPLES = Path(__file__).resolve().parents[4] / "examples"
ROWS = {"train": [{"from": {"volume": {"claimName": "c", "path": "rows.jsonl"}}}], "maxLength": 64}


def config(seeing: Path, pictures: Path, output: Path, **fields: Any) -> Any:
    wanted = spec("sft", dataset=ROWS, **fields)
    rows = DataInput(field="dataset.train[0]", part=wanted.dataset.train[0], path=str(pictures / "rows.jsonl"))
    return run_config(wanted, output, model=seeing, train=[rows])


def gathered(names: list[str], into: Path) -> Media:
    """These images, brought into this pod."""
    return gather([Named("image", name, "training row 1") for name in names], [], into)


def standing_of(media: Media, senses: Senses) -> Standing:
    return Standing(media, senses.placeholders, senses.ids, senses.text)


def answers(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    """What the model says of an image of each colour, in a shade that it has not seen."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    processor: Any = AutoProcessor.from_pretrained(adapter or folder)
    said = {}
    for colour in COLOURS:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION[7:]}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        image = Image.open(io.BytesIO(painted(colour, 4))).convert("RGB")
        batch = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
        out = model.eval().generate(**batch, max_new_tokens=8, do_sample=False)
        said[colour] = processor.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@proves("sft", "full", "images")
@pytest.mark.timeout(300)
def test_full_tuning_learns_to_tell_what_it_sees(
    start_ranks: StartRanks, seeing: Path, pictures: Path, tmp_path: Path
) -> None:
    block = training(maxSteps=120, learningRate=1e-2, perDeviceBatchSize=8)
    ranks = start_ranks(config(seeing, pictures, tmp_path / "out", tuner={"type": "full"}, training=block))
    assert ranks.end().exit is Exit.OK, ranks.log
    assert answers(tmp_path / "out/artifact") == {colour: f"It is {colour}." for colour in COLOURS}
    assert answers(seeing) != answers(tmp_path / "out/artifact")


@proves("sft", "lora", "images", "ddp")
@pytest.mark.timeout(300)
def test_an_adapter_leaves_the_eyes_alone(
    start_ranks: StartRanks, seeing: Path, pictures: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    block = training(maxSteps=12, learningRate=1e-2)
    tuner = {"lora": {"rank": 8, "dropout": 0}}
    losses = []
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        asked = {"perDeviceBatchSize": 6 // ranks}
        run = start_ranks(
            config(
                seeing, pictures, out, tuner=tuner, training={**block, **asked}, distributed={"processesPerNode": ranks}
            )
        )
        assert run.end().exit is Exit.OK, run.log
        losses.append([loss for _, loss in history(out)])
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    names = load_file(tmp_path / "out-1/artifact/adapter_model.safetensors")
    assert names
    assert all("language_model" in name for name in names), sorted(names)
    assert set(answers(seeing, tmp_path / "out-1/artifact")) == set(COLOURS)


def test_names_of_images_begin_where_the_rows_lie(tmp_path: Path) -> None:
    root = Root(path=tmp_path)
    row = conversation("<image><image>which is larger?", "The first.")
    raw = {**row, "images": ["a.png", "b/c.png"]}
    assert attached("image", raw, row, root, "rows", 1)["images"] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b/c.png"),
    ]


def test_parts_become_tags() -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is it?"}]
    url = [{"type": "text", "text": "and this? "}, {"type": "image_url", "image_url": {"url": "b.png"}}]
    row = tagged({"messages": [{"role": "user", "content": parts}, {"role": "user", "content": url}]})
    assert [message["content"] for message in row["messages"]] == ["<image>what is it?", "and this? <image>"]
    assert row["images"] == ["a.png", "b.png"]


def standard(method: str, raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A row as a method takes it."""
    wanted = spec(method, model={"from": {"fineTuneJob": {"name": "base"}}}, **fields)
    needs = METHODS[method].needs(run_config(wanted, Path("/nowhere")))
    return PartReader(wanted.dataset.train[0], needs, Root(path=Path("/data"))).standard(raw, "rows.jsonl", 3)


PARTS = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
GRPO = {"rewards": [{"name": "accuracy"}], "numGenerations": 2}
JUDGED = {"rewards": [{"rewardModel": {"from": {"fineTuneJob": {"name": "judge"}}}}], "numGenerations": 2}


def test_pairs_show_the_images_of_their_prompt() -> None:
    """In our form, and as TRL's data sets have it: parts without names, with the column beside them."""
    said = [{"role": "assistant", "content": each} for each in ("red", "blue")]
    trl = {
        "prompt": [{"role": "user", "content": PARTS}],
        "chosen": said[:1],
        "rejected": said[1:],
        "images": ["a.png"],
    }
    ours = {**conversation(QUESTION, "red"), "rejected_response": "blue", "images": ["a.png"]}
    again = {**ours, "rejected_messages": conversation(QUESTION, "blue")["messages"]}
    del again["rejected_response"]
    rows = [standard("dpo", each) for each in (trl, ours, again)]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["images"] == ["/data/a.png"]
    assert rows[0]["answers_from"] == 1


SHOWN = {**conversation(QUESTION, "red"), "images": ["a.png"]}
ANSWERED = {**conversation("what is red?", "<image>"), "images": ["a.png"]}


@pytest.mark.parametrize(
    ("method", "raw", "fields", "said"),
    [
        ("dpo", {**ANSWERED, "rejected_response": "none"}, {}, "an answer shows an <image>"),
        ("dpo", {**SHOWN, "rejected_response": "<image>"}, {}, "an answer shows an <image>"),
        ("kto", {**ANSWERED, "label": True}, {}, "an answer shows an <image>"),
        ("gkd", ANSWERED, {"gkd": {"teacher": {"from": {"fineTuneJob": {"name": "t"}}}}}, "an answer shows an <image>"),
        ("grpo", {**SHOWN, "solution": "red"}, {"grpo": JUDGED}, "'images' is given, and this job does not look"),
        ("ppo", SHOWN, {"ppo": {"rewardModel": {"from": {"fineTuneJob": {"name": "j"}}}}}, "'images' is given"),
        ("embedding", {"anchor": "a", "positive": "b", "image": "a.png"}, {}, "'image' is given"),
        ("embedding", {"anchor": "a", "positive": "b", "videos": ["a.mp4"]}, {}, "'videos' is given"),
        ("sft", {**conversation("what happens?", "It sinks."), "videos": ["a.mp4"]}, {}, "'videos' names 1"),
        ("rewardModel", {**SHOWN, "rejected_response": "blue", "images": []}, {}, None),
    ],
)
def test_what_nobody_looks_at_is_refused(method: str, raw: dict[str, Any], fields: Any, said: str | None) -> None:
    if said is None:
        assert "images" not in standard(method, raw, **fields)
        return
    with pytest.raises(Fault) as caught:
        standard(method, raw, **fields)
    assert caught.value.reason is Reason.DATA_INVALID
    assert "rows.jsonl row 3" in caught.value.message
    assert said in caught.value.message


def test_an_image_stands_in_the_ids_until_a_batch_shows_it(seeing: Path, tmp_path: Path) -> None:
    """Four tokens each; the last tokens of a row that is too long are not cut off, the row is left out."""
    from trimtab_trainer.methods.vision import Looking

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(painted("red" if name == "a.png" else "blue", 0))
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    found = gathered(names, tmp_path / "into")
    loaded = tokenizer.load(seeing, "model.from")
    processor = vision.load_processor(seeing, loaded, "model.from")
    config = run_config(spec("dpo", dataset={"train": [{"from": {"inline": "{}"}}], "maxLength": 48}), tmp_path / "out")
    template = ChatTemplate.of(loaded.chat_template, None, None, {})
    standing = standing_of(found, Senses(processor))
    render = spacious(template.renderer(), standing)
    encoder = Seen(METHODS["dpo"].encoder(config, loaded, render), standing)
    said = [{"role": "assistant", "content": "red"}]
    asked = [{"role": "user", "content": "<image><image>the same?"}]
    row = {"messages": [*asked, *said], "rejected": [*asked, *said], "answers_from": 1}
    long = {**row, "messages": [{"role": "user", "content": "<image><image>" + "the same? " * 20}, *said]}
    [record] = encoder.encode([{**row, "images": names}, {**long, "images": names}])
    assert encoder.conclude().deleted == 1
    for column in ("chosen_ids", "rejected_ids"):
        assert [each for each in record[column] if each < 0] == [-1] * 4 + [-2] * 4
    ids = torch.tensor([record["chosen_ids"], record["rejected_ids"]])
    batch = Looking(processor, found)({"input_ids": ids, "KL_input_ids": ids[:1]})
    assert (batch["input_ids"] == standing.ids["image"]).sum() == 16
    assert (batch["KL_input_ids"] >= 0).all()
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 4
    one, other = batch["pixel_values"].view(4, 16, -1).mean(dim=(1, 2))[:2].tolist()
    assert batch["pixel_values"].view(4, 16, -1).mean(dim=(1, 2)).tolist() == pytest.approx([one, other] * 2)
    assert one != other
    assert (batch["mm_token_type_ids"] == 1).sum() == 16
    assert batch["KL_mm_token_type_ids"].shape == (1, ids.shape[1])


def test_what_opens_a_processor_is_fetched_with_its_model(seeing: Path, tmp_path: Path) -> None:
    """From object storage and the hub the files come that are named; the image processor's are among them."""
    for path in seeing.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in SMALL_MODEL_FILES):
            shutil.copy(path, tmp_path)
    found = vision.load_processor(tmp_path, tokenizer.load(tmp_path, "model.from"), "model.from")
    assert Senses(found).text(Picture(56, 56)) == "<|image_pad|>" * 4


def test_a_placeholder_in_a_text_is_told(seeing: Path, tmp_path: Path) -> None:
    processor = vision.load_processor(seeing, tokenizer.load(seeing, "model.from"), "model.from")
    standing = standing_of(gathered([], tmp_path / "into"), Senses(processor))
    render = spacious(lambda *_, **__: "what is <|image_pad|>?", standing)
    with pytest.raises(Fault, match=r"shows nothing and has 1 <\|image_pad\|> in its text"):
        render([{"role": "user", "content": "what is <|image_pad|>?"}])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["a.png", "b.png"], "'images' names 2, the messages show 1 <image>"),
        (["https://example.com/a.png"], "is a URL"),
        (["../a.png"], "no path below a folder"),
        (["/a.png"], "no path below a folder"),
        ([7], "must be a list of paths"),
    ],
)
def test_what_a_row_may_not_name(images: list[Any], said: str, tmp_path: Path) -> None:
    row = conversation(QUESTION, "It is red.")
    with pytest.raises(Fault) as caught:
        attached("image", {**row, "images": images}, row, Root(path=tmp_path), "rows.jsonl", 3)
    assert caught.value.reason is Reason.DATA_INVALID
    assert "rows.jsonl row 3" in caught.value.message
    assert said in caught.value.message


def test_images_are_opened_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(painted("red", 0)[:60])
    (tmp_path / "text.png").write_text("no image")
    for name in ("torn.png", "text.png"):
        with pytest.raises(Fault) as caught:
            gathered([str(tmp_path / name)], tmp_path / "into")
        assert caught.value.reason is Reason.DATA_INVALID
        assert name in caught.value.message
    with pytest.raises(Fault) as caught:
        gathered([str(tmp_path / "gone.png")], tmp_path / "into")
    assert caught.value.reason is Reason.OBJECT_MISSING
    written = "data:image/png;base64," + base64.b64encode(painted("blue", 0)).decode()
    found = gathered([written, written], tmp_path / "into")
    assert [each.about for each in found.shown] == [(56, 56)]


def test_a_model_without_vision_is_told(start_ranks: StartRanks, tmp_path: Path, seeing: Path) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(seeing, blind)
    described = json.loads((blind / "config.json").read_text())
    del described["vision_config"]
    (blind / "config.json").write_text(json.dumps(described))
    image = "data:image/png;base64," + base64.b64encode(painted("blue", 0)).decode()
    rows = lines([{**conversation(QUESTION, "It is blue."), "images": [image]}])
    run = start_ranks(run_config(spec("sft", inline=rows), tmp_path / "out", model=blind))
    ended = run.end()
    assert ended.ending.reason is Reason.MODEL_INVALID
    assert "the model has no vision" in ended.ending.message


def test_rows_with_images_are_not_packed(pictures: Path, seeing: Path, tmp_path: Path) -> None:
    wanted = spec("sft", dataset={**ROWS, "packing": {}})
    rows = DataInput(field="dataset.train[0]", part=wanted.dataset.train[0], path=str(pictures / "rows.jsonl"))
    with pytest.raises(Fault) as caught:
        preflight.check(run_config(wanted, tmp_path / "out", model=seeing, train=[rows]), tmp_path)
    assert caught.value.reason is Reason.SPEC_INVALID
    assert "dataset.packing: the rows show images" in caught.value.message


def test_the_preflight_opens_images_and_asks_for_eyes(pictures: Path, seeing: Path, tmp_path: Path) -> None:
    sound = preflight.check(config(seeing, pictures, tmp_path / "out"), tmp_path / "sound")
    assert sound.reason is Reason.INPUTS_SOUND
    torn = tmp_path / "torn"
    shutil.copytree(pictures, torn)
    (torn / "images/red-28.png").write_bytes(painted("red", -28)[:50])
    with pytest.raises(Fault) as caught:
        preflight.check(config(seeing, torn, tmp_path / "out"), tmp_path / "broken")
    assert "images/red-28.png does not open" in caught.value.message


# grpo-python reads its functions, which a pod has and this computer has not.
METHOD_EXAMPLES = [path for path in sorted((EXAMPLES / "methods").glob("*.yaml")) if path.stem != "grpo-python"]


@pytest.mark.parametrize("example", METHOD_EXAMPLES, ids=lambda path: path.stem)
def test_films_and_sound_are_for_the_methods_that_were_proved_on_them(example: Path, tmp_path: Path) -> None:
    _, wanted = yamlfile.read(example)
    shown = set(needs_of(run_config(wanted, tmp_path)).shown)
    assert shown == set(KINDS) if wanted.method in ("pretrain", "sft") else shown <= {"image"}
