"""What cannot be merged is refused, by name, before anything is published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.merge.conftest import Models
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, Manifest, ManifestFile
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.__main__ import main
from trimtab_trainer.merge.job import merge
from trimtab_trainer.merge.tensorfile import parse_header

Q = "base_model.model.model.layers.0.self_attn.q_proj"


class Case(NamedTuple):
    name: str
    spoil: Callable[[Path, Path], None]
    """Given base and adapter."""
    reason: Reason
    words: tuple[str, ...]


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], None]:
    def spoil(base: Path, adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return spoil


def _adapter_config(**changes: object) -> Callable[[Path, Path], None]:
    return lambda base, adapter: _edit(adapter / "adapter_config.json", changes)


def _base_config(**changes: object) -> Callable[[Path, Path], None]:
    return lambda base, adapter: _edit(base / "config.json", changes)


def _edit(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _pickle(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def _pickled_base(base: Path, adapter: Path) -> None:
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


def _truncate(base: Path, adapter: Path) -> None:
    path = min(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def _lost_shard(base: Path, adapter: Path) -> None:
    min(base.glob("*.safetensors")).unlink()


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"][3, 1] = float("nan")


CASES = [
    Case(
        "a key that nothing takes",
        _tensors(lambda t: t.update({f"{Q.replace('layers.0', 'layers.7')}.lora_A.weight": torch.ones(4, 32)})),
        Reason.BASE_MISMATCH,
        ("fit nothing in the base", "layers.7.self_attn.q_proj.lora_A"),
    ),
    Case(
        "a key of a module that the configuration leaves out",
        _tensors(lambda t: t.update({f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight": torch.ones(4, 32)})),
        Reason.BASE_MISMATCH,
        ("layers.0.self_attn.k_proj.lora_A",),
    ),
    Case(
        "a factor of another shape",
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 48)})),
        Reason.BASE_MISMATCH,
        ("q_proj.lora_A", "[4, 48]", "[4, 32]"),
    ),
    Case(
        "a factor that is missing",
        _tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        Reason.MODEL_INVALID,
        ("lacks the tensor", "q_proj.lora_B"),
    ),
    Case("a value that is no number", _tensors(_not_a_number), Reason.ASSERTION_FAILED, ("q_proj", "not finite")),
    Case(
        "layers that the base does not have",
        _adapter_config(target_modules=["query_key_value"]),
        Reason.BASE_MISMATCH,
        ("does not fit the base", "query_key_value"),
    ),
    Case("another method", _adapter_config(peft_type="IA3"), Reason.MODEL_INVALID, ("IA3",)),
    Case("factors of a changed base", _adapter_config(init_lora_weights="pissa"), Reason.MODEL_INVALID, ("pissa",)),
    Case("a head of its own", _adapter_config(task_type="SEQ_CLS"), Reason.MODEL_INVALID, ("SEQ_CLS", "gives scores")),
    Case("vectors", _adapter_config(task_type="FEATURE_EXTRACTION"), Reason.MODEL_INVALID, ("gives vectors",)),
    Case("a pickled adapter", _pickle, Reason.UNSAFE_FORMAT, ("adapter_model.bin", "pickled")),
    Case("a pickled base", _pickled_base, Reason.UNSAFE_FORMAT, ("pytorch_model.bin", "pickled")),
    Case(
        "a quantised base",
        _base_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        Reason.MODEL_INVALID,
        ("quantised (bitsandbytes)",),
    ),
    Case("code of the model", _base_config(model_type="mystery"), Reason.MODEL_INVALID, ("mystery",)),
    Case("a base of another size", _base_config(hidden_size=64), Reason.MODEL_INVALID, ("config.json wants",)),
    Case("a file that ends too soon", _truncate, Reason.MODEL_INVALID, ("not a sound safetensors file",)),
    Case("a file that is not there", _lost_shard, Reason.MODEL_INVALID, ("model-00001-of", "not there")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, models: Models, tmp_path: Path) -> None:
    base = models.base()
    adapter = models.adapter(base)
    case.spoil(base, adapter)
    with pytest.raises(Fault) as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "merged")
    assert caught.value.reason is case.reason
    for word in case.words:
        assert word in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "merged" / "manifest.json").exists()


def test_a_base_of_another_digest_is_named(models: Models, tmp_path: Path) -> None:
    base = models.base()
    adapter = models.adapter(base)
    content = (base / "config.json").read_bytes()
    file = ManifestFile(path="config.json", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(files=[file])
    (base / "manifest.json").write_bytes(manifest.encoded())
    wanted = "sha256:" + "0" * 64
    (adapter / "args.json").write_text(json.dumps({"base": {"uri": "s3://models/other", "digest": wanted}}))
    with pytest.raises(Fault, match="s3://models/other") as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "merged")
    assert caught.value.reason is Reason.BASE_MISMATCH
    assert wanted in caught.value.message
    assert manifest.digest in caught.value.message


def test_a_full_output_is_left_alone(models: Models, tmp_path: Path) -> None:
    base = models.base()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("mine")
    with pytest.raises(Fault, match="not empty"):
        merge(base, [(models.adapter(base), 1.0)], tmp_path / "merged")
    assert (tmp_path / "merged" / "precious.txt").read_text() == "mine"


def test_float16_that_cannot_hold_the_values_is_refused(models: Models, tmp_path: Path) -> None:
    base = models.base()
    path = next(path for path in base.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    save_file({**load_file(path), "model.norm.weight": torch.full((32,), 1e6)}, path)
    with pytest.raises(Fault, match=r"model\.norm\.weight does not fit"):
        merge(base, [(models.adapter(base), 1.0)], tmp_path / "merged", dtype="float16")


@pytest.mark.parametrize("size", ["4", "GB", "0GB", "-1GB", "4TB", "1.5GB"])
def test_a_size_that_is_none(size: str, models: Models, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="maxShardSize"):
        merge(models.base(), [], tmp_path / "merged", max_shard_size=size)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "does not parse"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "takes 8 bytes"),
        (b'{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}', "unknown type X9"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[96,104]}}', "promises"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            "overlaps",
        ),
    ],
)
def test_headers_that_lie(header: bytes, words: str) -> None:
    with pytest.raises(Fault, match=words):
        parse_header(header, "model.safetensors", 8 + len(header) + 16)


def test_the_command_ends_with_the_table_s_code(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab_trainer.workplace.log_to_stderr", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("trimtab_trainer.merge.__main__.leave_out", lambda _: None)
    base = models.base()
    adapter = models.adapter(base)
    arguments = ["--base", str(base), "--output", str(tmp_path / "merged"), "--max-shard-size", "30MB"]
    assert main([*arguments, "--adapter", f"{adapter}=many"]) == Exit.SPEC_INVALID
    assert main([*arguments, "--adapter", f"{adapter}=0.5"]) == Exit.OK
    digest = Manifest.model_validate_json((tmp_path / "merged" / "manifest.json").read_bytes()).digest
    assert digest in capsys.readouterr().out
    assert main([*arguments, "--adapter", f"{adapter}=0.25"]) == Exit.SPEC_INVALID, "something else is in the output"
    assert "not empty" in capsys.readouterr().err
