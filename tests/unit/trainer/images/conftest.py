"""A tiny model that sees: two blocks of vision, two of language, a tokenizer that knows the placeholders."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.unit.trainer.conftest import conversation, lines, run_config, training
from trimtab_api.contract import DataInput, Ending, ModelInput, ProgressReport, RunConfig
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.model import tokenizer
from trimtab_trainer.notice import Notice

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SIDE = 56
PLACEHOLDERS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QUESTION = "<image>what colour is it?"


def painted(colour: str, shade: int) -> bytes:
    """A PNG of one colour, a little darker or lighter."""
    from PIL import Image

    values = tuple(min(255, max(0, value + shade)) for value in COLOURS[colour])
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), values).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows.jsonl and the images that its rows name, beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    rows = []
    for shade in range(-28, 29, 8):
        for colour in COLOURS:
            name = f"images/{colour}{shade}.png"
            (folder / name).write_bytes(painted(colour, shade))
            rows.append({**conversation(QUESTION, f"It is {colour}."), "images": [name]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp("seeing")
    rows = [conversation("what colour is it?", f"It is {colour}.") for colour in COLOURS]
    tokenizer.learn(rows, 300, None, None, folder)
    loaded: Any = tokenizer.load(folder, "model.from")
    loaded.add_tokens(PLACEHOLDERS, special_tokens=True)
    loaded.chat_template = TEMPLATE
    ids = dict(zip(PLACEHOLDERS, loaded.convert_tokens_to_ids(PLACEHOLDERS), strict=True))
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=loaded,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(loaded), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "eos_token_id": loaded.eos_token_id, "bos_token_id": None, "pad_token_id": loaded.pad_token_id,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ------------------------------------------------------------ runs in this process

SHADES = range(-28, 29, 8)
UNSEEN = (-24, -8, 8, 24)
"""Shades of held-out images."""
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shown(colour: str, shade: int, answer: str | None = None) -> dict[str, Any]:
    """A question about an image, with an answer or without."""
    written = "data:image/png;base64," + base64.b64encode(painted(colour, shade)).decode()
    return {**conversation(QUESTION, *([] if answer is None else [answer])), "images": [written]}


def others(colour: str) -> list[str]:
    """The colours that it is not."""
    return [each for each in COLOURS if each != colour]


class Quiet:
    """Reports to nobody."""

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""

    def close(self) -> None:
        """See Reporter."""


@dataclass(frozen=True)
class Done:
    """A run that ended well."""

    ending: Ending
    output: Path

    @property
    def folder(self) -> Path:
        """What it published."""
        return self.output / "artifact"

    def logged(self, key: str) -> list[float]:
        """A metric at each log line."""
        entries = json.loads((self.output / "report/history.json").read_text())
        return [entry[key] for entry in entries if key in entry]


def run_here(
    method: str,
    rows: Rows | Path,
    output: Path,
    base: Path,
    held_out: Sequence[dict[str, Any]] = (),
    further: dict[str, Path] | None = None,
    **fields: Any,
) -> Done:
    """A job in this process, on inline rows or a file of rows."""
    written = {"volume": {"claimName": "c", "path": "r"}} if isinstance(rows, Path) else {"inline": lines(rows)}
    asked = {
        "train": [{"from": written}],
        "validation": [{"from": {"inline": lines(list(held_out))}}] if held_out else [],
        "maxLength": 64,
        **fields.pop("dataset", {}),
    }
    steps = {"perDeviceBatchSize": 12, "weightDecay": 0, **fields.pop("training", {})}
    document = {"method": method, "model": {"from": {"fineTuneJob": {"name": "base"}}}, **fields, "dataset": asked}
    wanted = FineTuneJobSpec.model_validate({**document, "training": training(**steps)})
    beside = [
        ModelInput(field=field, reference=f"fineTuneJob/{folder.parent.name}", path=str(folder))
        for field, folder in (further or {}).items()
    ]
    files = None
    if isinstance(rows, Path):
        files = [DataInput(field="dataset.train[0]", part=wanted.dataset.train[0], path=str(rows))]
    return run_config_here(run_config(wanted, output, name=output.name, model=base, further=beside, train=files))


def run_config_here(config: RunConfig) -> Done:
    """run.json, run in this process."""
    from trimtab_trainer.run import Run

    assert config.output.path is not None
    output, group = Path(config.output.path), Group(Place(0, 0, 1, 1), 1, 60)
    return Done(Run(config, group, output.with_name(output.name + "-work"), Notice(), Quiet())(), output)


def see_eyes_alone(base: Path, folder: Path) -> None:
    """The artifact has its processor, and what makes tokens of images is what it was."""
    assert (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    if (folder / "adapter_model.safetensors").is_file():
        names = load_file(folder / "adapter_model.safetensors")
        assert all("language_model" in name or "score" in name for name in names), sorted(names)
        return
    before, after = (
        {name.removeprefix("model."): weight for name, weight in load_file(each / "model.safetensors").items()}
        for each in (base, folder)
    )
    eyes = [name for name in before if name.startswith("visual.")]
    assert eyes
    assert all(torch.equal(before[name], after[name]) for name in eyes)


Tune = Callable[..., Done]


@pytest.fixture
def tune(mistaken: Path, tmp_path: Path) -> Tune:
    """Run a job on the mistaken base."""

    def run(method: str, rows: Rows, *held_out: dict[str, Any], name: str = "out", **fields: Any) -> Done:
        return run_here(method, rows, tmp_path / name, fields.pop("base", mistaken), held_out, **fields)

    return run


@pytest.fixture(scope="session")
def mistaken(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tells colours apart, and calls two of three images by the name of another colour."""
    follows = dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True))
    rows = [
        shown(colour, shade, answer)
        for shade in SHADES
        for colour in COLOURS
        for answer in (follows[colour], follows[colour], colour)
    ]
    output = tmp_path_factory.mktemp("mistaken") / "base"
    plan = {"maxSteps": 60, "learningRate": 1e-2, "perDeviceBatchSize": 24, "loggingSteps": 60}
    return run_here("sft", rows, output, seeing, tuner={"type": "full"}, training=plan).folder
