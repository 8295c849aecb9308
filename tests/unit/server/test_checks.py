"""What the engine could not serve is refused by name before it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trimtab_api.conditions import Reason
from trimtab_server.agent.checks import Base, check_adapter, read_base
from trimtab_server.agent.failure import Unservable
from trimtab_server.agent.inputs import Fetched

from .conftest import write_adapter, write_base

SERVED = "sha256:" + "a" * 64


@dataclass(frozen=True)
class Case:
    name: str
    reason: Reason
    says: str
    made: dict[str, Any] = field(default_factory=dict)
    """How the adapter differs from a sound one."""
    room: int = 16
    origin: str | None = None
    """Digest of the base that its manifest names."""


CASES = [
    Case("rank beyond the room", Reason.ADAPTER_RANK_TOO_LARGE, "set spec.engine.maxLoraRank to 32", {"rank": 20}),
    Case("rank beyond every room", Reason.ADAPTER_RANK_TOO_LARGE, "MergeJob", {"rank": 600}),
    Case("rank of one pattern", Reason.ADAPTER_RANK_TOO_LARGE, "rank 64", {"rank_pattern": {"q_proj": 64}}),
    Case("rank told too small", Reason.ADAPTER_RANK_TOO_LARGE, "rank 24", {"rank": 24, "r": 8}),
    Case("no room at all", Reason.ADAPTER_RANK_TOO_LARGE, "without adapters", room=0),
    Case("DoRA", Reason.ADAPTER_UNSUPPORTED, "use_dora", {"use_dora": True}),
    Case("whole modules", Reason.ADAPTER_UNSUPPORTED, "modules_to_save", {"modules_to_save": ["lm_head"]}),
    Case("bias", Reason.ADAPTER_UNSUPPORTED, "bias", {"bias": "lora_only"}),
    Case("LoRA bias", Reason.ADAPTER_UNSUPPORTED, "lora_bias", {"lora_bias": True}),
    Case("PiSSA", Reason.ADAPTER_UNSUPPORTED, "init_lora_weights", {"init_lora_weights": "pissa_niter_16"}),
    Case("single tokens", Reason.ADAPTER_UNSUPPORTED, "trainable_token_indices", {"trainable_token_indices": [1]}),
    Case("repeated layers", Reason.ADAPTER_UNSUPPORTED, "layer_replication", {"layer_replication": [[0, 1]]}),
    Case("another tuner", Reason.ADAPTER_UNSUPPORTED, "LOHA", {"peft_type": "LOHA"}),
    Case("another base by digest", Reason.BASE_MISMATCH, "sha256:bbbb", origin="sha256:" + "b" * 64),
    Case("another base by width", Reason.BASE_MISMATCH, "another base", {"hidden": 16}),
    Case("another base by depth", Reason.BASE_MISMATCH, "no layer 2", {"layers": 3}),
]


def check(folder: Path, room: int = 16, origin: str | None = None, base: Base | None = None) -> None:
    made_by = {"base": {"uri": "s3://models/base", "digest": origin}} if origin else {}
    base = base or read_base(Fetched(write_base(folder.parent / "base"), SERVED))
    check_adapter("swift", Fetched(folder, None, made_by), base, room)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refusals(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Unservable) as caught:
        check(write_adapter(tmp_path / "swift", **case.made), case.room, case.origin)
    assert caught.value.reason is case.reason
    assert case.says in caught.value.message
    assert caught.value.message.startswith("adapters[swift]: ")
    assert not caught.value.transient


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"rank": 16},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": True, "use_rslora": True},
        {"modules_to_save": [], "bias": "none", "use_dora": False, "loftq_config": {}, "layer_replication": None},
        {"layers": 1},
    ],
)
def test_sound_adapters_pass(made: dict[str, Any], tmp_path: Path) -> None:
    check(write_adapter(tmp_path / "swift", **made), origin=SERVED)


def test_an_adapter_of_another_architecture_is_a_mismatch(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "swift")
    tensors = {
        name.replace("model.layers", "transformer.h").replace("self_attn.q_proj", "attn.c_attn"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if "q_proj" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Unservable, match="nothing of that name") as caught:
        check(folder)
    assert caught.value.reason is Reason.BASE_MISMATCH


def test_prefixes_that_differ_between_disk_and_run_time_do_not_matter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "swift")
    tensors = {
        name.replace("model.model.layers", "model.model.language_model.layers"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    check(folder)


def test_a_transposed_layout_is_known_by_its_flag(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    save_file({"h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32)}, base / "model.safetensors")
    folder = write_adapter(tmp_path / "swift", fan_in_fan_out=True)
    name = "base_model.model.transformer.h.0.attn.c_attn"
    factors = {f"{name}.lora_A.weight": np.zeros((4, 8)), f"{name}.lora_B.weight": np.zeros((24, 4))}
    save_file(factors, folder / "adapter_model.safetensors")
    check(folder, base=read_base(Fetched(base, None)))


def test_a_tensor_that_is_no_factor_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "swift")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = np.zeros((16, 8), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Unservable, match="no low-rank factor"):
        check(folder)


def test_shapes_of_a_quantised_base_say_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    check(write_adapter(tmp_path / "swift", hidden=64), base=read_base(Fetched(base, None)))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no LoRA configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "not safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "not safetensors"),
        (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "holds no adapter"),
    ],
    ids=["no config", "torn config", "odd config", "no weights", "short", "garbage", "empty"],
)
def test_broken_folders_are_told(tmp_path: Path, spoil: Any, says: str) -> None:
    folder = write_adapter(tmp_path / "swift")
    spoil(folder)
    with pytest.raises(Unservable, match=says) as caught:
        check(folder)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_base_with_a_missing_shard_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(Unservable, match="model-00002-of-00002"):
        read_base(Fetched(base, None))
