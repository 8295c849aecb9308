"""Makers for the merge's tests: tiny models of random weights, adapters with an effect, a real S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.ports import free_port
from trimtab_api.contract import Connection

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SMALL, "tie_word_embeddings": False}),
    "tied": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}


@dataclass
class Models:
    """Makes bases and adapters below a folder."""

    root: Path

    def base(self, kind: str = "llama", dtype: torch.dtype = torch.float32, name: str = "base", **changes: Any) -> Path:
        """A model of random weights, saved as transformers saves it."""
        class_name, settings = CONFIGS[kind]
        torch.manual_seed(sum(map(ord, name)))
        config = getattr(transformers, class_name)(**{**settings, **changes})
        model = AutoModelForCausalLM.from_config(config)
        # Weights as large as trained ones, so that logits differ and every mistake shows.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        model.to(dtype).save_pretrained(self.root / name, max_shard_size="20KB")
        return self.root / name

    def adapter(self, base: Path, name: str = "adapter", **settings: Any) -> Path:
        """An adapter on the base whose every factor has an effect."""
        torch.manual_seed(sum(map(ord, name)))
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}))
            for key, parameter in tuned.named_parameters():
                if "lora_magnitude" in key:
                    parameter.data.mul_(1.1)
                elif parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            tuned.save_pretrained(self.root / name)
        return self.root / name


class quiet(warnings.catch_warnings):  # noqa: N801 - reads as a word
    """PEFT and transformers warn of what these tests do on purpose."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def sample(size: int = 64) -> torch.Tensor:
    return torch.randint(size, (3, 12), generator=torch.Generator().manual_seed(7))


def logits(folder: Path) -> torch.Tensor:
    """Logits of a whole model as transformers loads it, in float32."""
    with quiet(), torch.inference_mode():
        outcome: torch.Tensor = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(sample()).logits
        )
    return outcome


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base and adapter, unmerged, in float32."""
    with quiet(), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        outcome: torch.Tensor = PeftModel.from_pretrained(model, adapter).eval()(input_ids=sample()).logits
    return outcome


@dataclass
class Server:
    """`rclone serve s3` over a folder."""

    root: Path
    connection: Connection


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("s3")
    (root / "served" / "bucket").mkdir(parents=True)
    (root / "keys").mkdir()
    (root / "keys" / "AWS_ACCESS_KEY_ID").write_text("KEY")
    (root / "keys" / "AWS_SECRET_ACCESS_KEY").write_text("secret")
    port = free_port()
    rclone = [Path(sys.executable).parent / "rclone", "serve", "s3", "--auth-key", "KEY,secret"]
    process = subprocess.Popen(
        [*rclone, "--addr", f"127.0.0.1:{port}", root / "served"],
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "RCLONE_CONFIG": os.devnull, "HOME": str(root)},
    )
    eventually("rclone listens", lambda: _listening(port))
    yield Server(
        root / "served" / "bucket",
        Connection(endpoint=f"http://127.0.0.1:{port}", path_style=True, credentials_dir=str(root / "keys")),
    )
    process.kill()
    process.wait(10)


def eventually(what: str, holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something holds, or fail by its name."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
