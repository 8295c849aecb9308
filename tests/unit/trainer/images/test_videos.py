"""Conversations that show video: what the library makes of them, what is learnt, and what is wrong with them."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation, run_config, spec
from tests.unit.trainer.images.conftest import (
    COLOURS,
    PLACEHOLDERS,
    SHADES,
    SIDE,
    TEMPLATE,
    UNSEEN,
    others,
    painted,
    run_config_here,
    run_here,
    see_eyes_alone,
)
from tests.unit.trainer.images.films import ASKED, FRAMES, RATE, file_of, film, filmed, films, kept, tone
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput
from trimtab_api.v1alpha1.dataset import Multimodal
from trimtab_trainer import preflight, yamlfile
from trimtab_trainer.data.film import Film, frames
from trimtab_trainer.data.media import tagged
from trimtab_trainer.data.opened import Named, Picture, gather
from trimtab_trainer.data.seen import Seen, Standing, spacious
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods import METHODS
from trimtab_trainer.methods.vision import Looking
from trimtab_trainer.model import senses, tokenizer, vision
from trimtab_trainer.template import ChatTemplate

pytestmark = pytest.mark.timeout(300)

FULL: dict[str, Any] = {"type": "full"}
LORA: dict[str, Any] = {"lora": {"rank": 8, "dropout": 0}}
EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "images"


def family(name: str, folder: Path, base: Path) -> Path:
    """A tiny model of one of the families, with the tokens of the images' tiny model."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    if name == "qwen2_vl":
        return base
    loaded: Any = AutoTokenizer.from_pretrained(base)
    ids = dict(zip(PLACEHOLDERS, loaded.convert_tokens_to_ids(PLACEHOLDERS), strict=True))
    described = json.loads((base / "config.json").read_text())
    text = described["text_config"]
    sight = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 64}
    third = name == "qwen3_vl"
    further = (
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 16} if third else {"fullatt_block_indexes": [1]}
    )
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(
        name,
        text_config={**{key: value for key, value in text.items() if key != "model_type"}, "head_dim": 8},
        vision_config={**sight, **further},
        **{key: described[key] for key in ("image_token_id", "video_token_id", "tie_word_embeddings")},
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    whole: Any = AutoProcessor.from_pretrained(base)
    pixels = 64 * 64
    videos = (
        Qwen3VLVideoProcessor(size={"shortest_edge": pixels * 4, "longest_edge": pixels * FRAMES})
        if third
        else Qwen2VLVideoProcessor(size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE})
    )
    images: Any = AutoImageProcessor.from_pretrained(base)
    if third:
        images.patch_size, images.size = 16, {"shortest_edge": pixels, "longest_edge": pixels}
    made = PROCESSOR_MAPPING[type(config)](
        image_processor=images, tokenizer=whole.tokenizer, video_processor=videos, chat_template=TEMPLATE
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_is_what_the_library_makes(kind: str, seeing: Path, tmp_path: Path) -> None:
    """Token ids, grids, times and tensors of two rows of unlike length, and what the model says of them."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.video_utils import load_video

    folder = family(kind, tmp_path / "model", seeing)
    for number, name in enumerate(("left", "right")):
        kept(tmp_path, f"{name}.mp4", film("red", "green", frames=FRAMES + 5 * number))
    kept(tmp_path, "red.png", painted("red", 0))
    rows: list[dict[str, Any]] = [
        {**conversation("<video>and <image>where?", "left"), "videos": ["left.mp4"], "images": ["red.png"]},
        {**conversation("<video> then <video>", "right"), "videos": ["right.mp4", "left.mp4"]},
    ]
    named = [{key: [str(tmp_path / each) for each in row.get(key, [])] for key in ("videos", "images")} for row in rows]
    rows = [
        {**row, **{key: value for key, value in names.items() if value}} for row, names in zip(rows, named, strict=True)
    ]

    loaded = tokenizer.load(folder, "model.from")
    processor = vision.load_processor(folder, loaded, "model.from")
    senses.settle(processor, None)
    able = senses.Senses(processor)
    wanted = [Named(key[:-1], each, "row") for names in named for key in names for each in names[key]]  # type: ignore[arg-type]
    media = gather(wanted, [], tmp_path / "into")
    standing = Standing(media, able.placeholders, able.ids, able.text)
    template = ChatTemplate.of(loaded.chat_template, None, None, {})
    render = spacious(template.renderer(), standing)
    config = run_config(spec("sft", dataset={"train": [{"from": {"inline": "{}"}}]}), tmp_path / "out")
    encoder = Seen(METHODS["sft"].encoder(config, loaded, render), standing)
    records = list(encoder.encode(rows))
    longest = max(len(record["input_ids"]) for record in records)
    ids = torch.full((2, longest), loaded.pad_token_id)
    mask = torch.zeros((2, longest), dtype=torch.long)
    for row, record in enumerate(records):
        ids[row, : len(record["input_ids"])] = torch.tensor(record["input_ids"])
        mask[row, : len(record["input_ids"])] = 1
    ours = Looking(processor, media)({"input_ids": ids, "attention_mask": mask})

    library: Any = AutoProcessor.from_pretrained(folder)
    said = [
        template.renderer()([{**each, "content": _parts(each["content"])} for each in row["messages"]]) for row in rows
    ]
    opened = [load_video(name, backend="pyav") for names in named for name in names["videos"]]
    theirs = library(
        text=said,
        images=[Image.open(tmp_path / "red.png").convert("RGB")],
        videos=[each for each, _ in opened],
        video_metadata=[about for _, about in opened],
        do_sample_frames=True,
        fps=2,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert set(ours) == set(theirs)
    for key in theirs:
        exact = not theirs[key].is_floating_point()
        assert (torch.equal if exact else torch.allclose)(ours[key], theirs[key]), key
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(model(**ours).logits, model(**theirs).logits, atol=1e-5)


def _parts(text: str) -> list[dict[str, str]]:
    kinds = {"<video>": "video", "<image>": "image"}
    pieces = [piece for piece in re.split("(<video>|<image>)", text) if piece]
    return [{"type": kinds[each]} if each in kinds else {"type": "text", "text": each} for each in pieces]


def share_right(base: Path, folder: Path) -> float:
    """How often the likeliest of the names is the last colour, on films that no row shows."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    adapted = (folder / "adapter_config.json").is_file()
    model: Any = AutoModelForImageTextToText.from_pretrained(base if adapted else folder)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    processor: Any = AutoProcessor.from_pretrained(folder)
    right, asked = 0, [(first, last, shade) for shade in UNSEEN for last in COLOURS for first in others(last)]
    for first, last, shade in asked:
        content = film(first, last, shade)
        scores = {said: _likelihood(model.eval(), processor, content, said) for said in COLOURS}
        right += scores[last] == max(scores.values())
    return right / len(asked)


def _likelihood(model: Any, processor: Any, content: bytes, said: str) -> float:
    import av
    import numpy

    with av.open(io.BytesIO(content)) as container:
        pictures = [each.to_ndarray(format="rgb24") for each in container.decode(video=0)]
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASKED.removeprefix("<video>")}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    about = {"total_num_frames": len(pictures), "fps": RATE, "duration": len(pictures) / RATE}

    def batch(text: str) -> Any:
        return processor(
            text=[text],
            videos=[numpy.stack(pictures)],
            video_metadata=[about],
            do_sample_frames=True,
            return_tensors="pt",
        )

    start, whole = batch(prompt)["input_ids"].shape[1], batch(f"{prompt}{said}<|im_end|>")
    with torch.no_grad():
        logits = model(**whole).logits[0, :-1].log_softmax(-1)
    ids = whole["input_ids"][0]
    return float(logits[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())


@pytest.fixture(scope="module")
def mistaking(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sees films, and calls two of three by the colour that comes first."""
    folder = tmp_path_factory.mktemp("mistaking")
    rows = [
        filmed(first, last, answer, shade)
        for shade in SHADES
        for last in COLOURS
        for first in others(last)
        for answer in (first, first, last)
    ]
    plan = {"maxSteps": 80, "learningRate": 1e-2, "perDeviceBatchSize": 18, "loggingSteps": 80}
    return run_here("sft", file_of(rows, folder / "rows"), folder / "base", seeing, tuner=FULL, training=plan).folder


@proves("sft", "video")
@pytest.mark.parametrize("tuner", [FULL, LORA], ids=["full", "lora"])
def test_what_comes_last_is_learnt(tuner: dict[str, Any], mistaking: Path, tmp_path: Path) -> None:
    rows = file_of(films(SHADES), tmp_path / "rows")
    plan = {"maxSteps": 32, "learningRate": 1e-2 if tuner is LORA else 5e-3}
    done = run_here("sft", rows, tmp_path / "out", mistaking, tuner=tuner, training=plan)
    assert share_right(mistaking, mistaking) < 0.4
    assert share_right(mistaking, done.folder) > 0.8
    see_eyes_alone(mistaking, done.folder)


@proves("pretrain", "video")
def test_films_are_pretrained_on(mistaking: Path, tmp_path: Path) -> None:
    """What films are shown among is learnt as well, and they themselves are not."""
    rows = file_of(films(SHADES), tmp_path / "rows")
    plan = {"maxSteps": 20, "learningRate": 5e-3, "evalSteps": 20, "evaluateAtStart": True}
    done = run_here("pretrain", rows, tmp_path / "out", mistaking, films(UNSEEN[:1]), tuner=FULL, training=plan)
    before, after = done.logged("eval_loss")
    assert after < 0.5 * before
    see_eyes_alone(mistaking, done.folder)


def test_the_example_runs_as_it_is(mistaking: Path, tmp_path: Path) -> None:
    _, wanted = yamlfile.read(EXAMPLES / "video.yaml")
    done = run_config_here(run_config(wanted, tmp_path / "out", model=mistaking))
    assert done.ending.artifact is not None
    see_eyes_alone(mistaking, done.folder)


# ------------------------------------------------------------ rows


def test_parts_become_tags() -> None:
    """Of videos and sound, in the forms of several clients."""
    parts = [
        {"type": "video", "video": "a.mp4"},
        {"type": "text", "text": "and "},
        {"type": "video_url", "video_url": {"url": "b.mp4"}},
        {"type": "audio", "audio_url": "c.wav"},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
    ]
    row = tagged({"messages": [{"role": "user", "content": parts}]})
    assert row["messages"][0]["content"] == "<video>and <video><audio><audio>"
    assert (row["videos"], row["audios"]) == (["a.mp4", "b.mp4"], ["c.wav", "data:audio/wav;base64,QUJD"])


def preflighted(folder: Path, seeing: Path, **dataset: Any) -> Any:
    """What the preflight says of rows.jsonl in a folder."""
    asked = {"train": [{"from": {"volume": {"claimName": "c", "path": "rows.jsonl"}}}], "maxLength": 64, **dataset}
    wanted = spec("sft", dataset=asked)
    rows = DataInput(field="dataset.train[0]", part=wanted.dataset.train[0], path=str(folder / "rows.jsonl"))
    return preflight.check(run_config(wanted, folder / "out", model=seeing, train=[rows]), folder / "work")


def test_films_are_opened_before_the_training(seeing: Path, tmp_path: Path) -> None:
    """What is wrong with one is told with the number of its row."""
    wrong = {
        "does not open as a video": b"no film",
        "has no picture": tone(0.1),
        "has a single frame": film("red", "red", frames=1),
        "is cut short": _cut(matroska(20)),
    }
    file_of(films(SHADES[:1]), tmp_path)
    sound = preflighted(tmp_path, seeing)
    assert sound.reason is Reason.INPUTS_SOUND
    assert "in the longest row beside their videos" in sound.message
    for said, content in wrong.items():
        shutil.rmtree(tmp_path / "work")
        kept(tmp_path, "2.mp4", content)
        with pytest.raises(Fault, match=said) as caught:
            preflighted(tmp_path, seeing)
        assert caught.value.reason is Reason.DATA_INVALID
        assert caught.value.message.startswith(f"training row 3: video {tmp_path}/2.mp4 ")


def _cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def matroska(frames: int) -> bytes:
    """A film whose file does not say how many frames it has."""
    import av
    import numpy

    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        video: Any = container.add_stream("ffv1", rate=RATE)
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        noise = numpy.random.default_rng(0)
        for _ in range(frames):
            picture = noise.integers(0, 255, (SIDE, SIDE, 3), dtype=numpy.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def test_frames_are_counted_where_the_file_does_not_say(tmp_path: Path) -> None:
    kept(tmp_path, "a.mkv", matroska(20))
    media = gather([Named("video", str(tmp_path / "a.mkv"), "row")], [], tmp_path / "into")
    assert media.shown[0].about == Film(SIDE, SIDE, 20, float(RATE))
    assert frames(tmp_path / "a.mkv", [3, 3, 19]).shape == (3, SIDE, SIDE, 3)


def test_a_model_that_takes_no_film_is_told(seeing: Path, tmp_path: Path) -> None:
    file_of(films(SHADES[:1]), tmp_path)
    blind = tmp_path / "blind"
    shutil.copytree(seeing, blind)
    described = json.loads((blind / "config.json").read_text())
    del described["vision_config"]
    (blind / "config.json").write_text(json.dumps(described))
    with pytest.raises(Fault, match="the rows show videos and the model has no vision") as caught:
        preflighted(tmp_path, blind)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_frames_and_pixels_are_bounded(seeing: Path) -> None:
    """What the job says goes before what the processor has; the processor that is published has both."""
    processor = vision.load_processor(seeing, tokenizer.load(seeing, "model.from"), "model.from")
    senses.settle(processor, None)
    long = Film(SIDE, SIDE, 160, 16.0)
    assert len(senses.Senses(processor).frames(long)) == 20
    asked = Multimodal(video_fps=4, video_max_frames=12, video_max_pixels=28 * 28, max_pixels=28 * 28)
    senses.settle(processor, asked)
    able = senses.Senses(processor)
    assert len(able.frames(long)) == 12
    assert able.text(long) == "<|video_pad|>" * 6
    assert able.text(Picture(SIDE, SIDE)) == "<|image_pad|>"
    assert (processor.video_processor.fps, processor.video_processor.max_frames) == (4, 12)
    del processor.video_processor
    with pytest.raises(Fault, match=r"dataset\.multimodal\.videoFps: the model's processor knows no such bound"):
        senses.settle(processor, Multimodal(video_fps=4))
