"""A tiny model that sees: two blocks of vision, two of language, a tokenizer that knows the placeholders."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation
from trimtab_trainer.model import tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SIDE = 56
PLACEHOLDERS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
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
