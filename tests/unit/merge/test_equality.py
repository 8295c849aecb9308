"""A merged model answers as base and adapter do, for every kind of adapter and of base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.unit.merge.conftest import Models, logits, peft_logits, quiet
from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.destination import FolderDestination
from trimtab_trainer.merge.job import merge
from trimtab_trainer.merge.verify import Stored


class Case(NamedTuple):
    name: str
    kind: str
    settings: dict[str, Any]


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    Case("every linear layer", "llama", {"target_modules": "all-linear"}),
    Case("biases of the base", "qwen2", {"target_modules": LINEAR}),
    Case("trained biases", "qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    Case("a bias of the factors", "qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    Case("rsLoRA", "llama", {"use_rslora": True, "lora_alpha": 16}),
    Case("DoRA", "llama", {"use_dora": True, "target_modules": LINEAR}),
    Case("rank and alpha patterns", "llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 24}}),
    Case("some layers", "llama", {"layers_to_transform": [1]}),
    Case("fan in, fan out", "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Case("DoRA, fan in, fan out", "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    Case("embeddings", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    Case("DoRA on embeddings", "llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    Case("whole modules", "llama", {"modules_to_save": ["lm_head", "norm"]}),
    Case("some tokens", "llama", {"trainable_token_indices": {"embed_tokens": [1, 5, 63]}}),
    Case("tied, untouched", "tied", {}),
    Case("tied, embeddings saved", "tied", {"modules_to_save": ["embed_tokens"]}),
    Case("tied, both saved", "tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    Case("tied, head tuned", "tied", {"target_modules": ["lm_head", "q_proj"]}),
    Case("mixtral's attention", "mixtral", {}),
    Case(
        "mixtral's experts",
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    Case("mixtral's names of old", "mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    Case("qwen3's experts", "qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that every tensor is more than one, and every edge is walked."""
    monkeypatch.setattr("trimtab_trainer.merge.update.BLOCK", 100)
    monkeypatch.setattr("trimtab_trainer.merge.verify.BLOCK", 150)
    monkeypatch.setattr("trimtab_trainer.merge.units._PIECE", 700)
    monkeypatch.setattr("trimtab_trainer.merge.checkpoint.CHUNK", 1000)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_is_base_and_adapter(case: Case, models: Models, tmp_path: Path) -> None:
    base = models.base(case.kind)
    adapter = models.adapter(base, **case.settings)
    outcome = merge(base, [(adapter, 1.0)], tmp_path / "merged", max_shard_size="1MB")
    wanted = peft_logits(base, adapter)
    assert (wanted - logits(base)).abs().max() > 0.05, "the adapter of this test has no effect"
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=5e-5, rtol=1e-4)
    assert outcome.manifest.made_by["verification"]["method"] == "peft"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_names_and_types_are_the_base_s(kind: str, models: Models, tmp_path: Path) -> None:
    base = models.base(kind, dtype=torch.bfloat16)
    adapter = models.adapter(base)
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    before, after = _tensors(base), _tensors(tmp_path / "merged")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype, models: Models, tmp_path: Path) -> None:
    base = models.base(dtype=dtype)
    adapter = models.adapter(base, target_modules="all-linear")
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        exact = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    merged = _tensors(tmp_path / "merged")
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        # One rounding to nearest, and of float32 sums what their order makes of terms that cancel each other.
        near = exact[name].abs().clamp_min(torch.finfo(dtype).smallest_normal) * 0.51 * torch.finfo(dtype).eps
        unsure = exact[name].abs().max() * torch.finfo(torch.float32).eps
        assert ((tensor.float() - exact[name]).abs() <= near + unsure).all(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_written_and_said(dtype: str, models: Models, tmp_path: Path) -> None:
    base = models.base("tied")
    merge(base, [(models.adapter(base), 1.0)], tmp_path / "merged", dtype=dtype)
    assert {tensor.dtype for tensor in _tensors(tmp_path / "merged").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_weights_of_several_adapters_add_up(models: Models, tmp_path: Path) -> None:
    base = models.base()
    one = models.adapter(base, "one", target_modules=["q_proj", "k_proj"])
    two = models.adapter(base, "two", target_modules=["q_proj", "down_proj"], r=8)
    outcome = merge(base, [(one, 0.5), (two, -0.25)], tmp_path / "merged")
    assert outcome.manifest.made_by["verification"]["method"] == "peft"
    parts = []
    for adapter in (one, two):
        merge(base, [(adapter, 1.0)], tmp_path / f"{adapter.name}-merged")
        parts.append(_tensors(tmp_path / f"{adapter.name}-merged"))
    before, after = _tensors(base), _tensors(tmp_path / "merged")
    for name, tensor in before.items():
        wanted = tensor + 0.5 * (parts[0][name] - tensor) - 0.25 * (parts[1][name] - tensor)
        torch.testing.assert_close(after[name], wanted, atol=1e-6, rtol=1e-5)


def test_adapters_that_peft_cannot_run_together_are_checked_by_weights(models: Models, tmp_path: Path) -> None:
    base = models.base()
    one = models.adapter(base, "one", use_dora=True)
    two = models.adapter(base, "two", modules_to_save=["lm_head"])
    outcome = merge(base, [(one, 1.0), (two, 0.5)], tmp_path / "merged")
    assert outcome.manifest.made_by["verification"]["method"].startswith("weights: several adapters")


def test_tied_embeddings_that_were_tuned_are_untied(models: Models, tmp_path: Path) -> None:
    base = models.base("tied")
    adapter = models.adapter(base, modules_to_save=["embed_tokens"])
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    tensors, before = _tensors(tmp_path / "merged"), _tensors(base)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_the_check_never_has_a_whole_matrix(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    whole = Stored.whole

    def noted(self: Stored, name: str) -> torch.Tensor:
        asked.append(name)
        return whole(self, name)

    monkeypatch.setattr(Stored, "whole", noted)
    base = models.base()
    merge(base, [(models.adapter(base, target_modules="all-linear"), 1.0)], tmp_path / "merged")
    assert asked
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in asked} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }


def test_a_model_that_reaches_into_its_matrices_is_checked_too(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reaching(self: LlamaMLP, sample: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.linear(sample, self.up_proj.weight)
        return self.down_proj(self.act_fn(self.gate_proj(sample)) * inner)  # type: ignore[no-any-return]

    base = models.base()
    adapter = models.adapter(base, target_modules=["q_proj", "down_proj"])
    monkeypatch.setattr(LlamaMLP, "forward", reaching)
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    found = json.loads((tmp_path / "merged/args.json").read_text())["verification"]
    assert found["maxDifference"] <= found["tolerance"]
    monkeypatch.setattr("trimtab_trainer.merge.update.Arithmetic.apply", lambda self, base, dtype, **_: base.to(dtype))
    with pytest.raises(Fault, match="merged logits differ"):
        merge(base, [(adapter, 1.0)], tmp_path / "wrong")


@pytest.mark.parametrize("name", ["embed_tokens", "v_proj", "norm", "lm_head"])
def test_one_wrong_value_in_what_was_written_is_found(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the check takes in blocks, it takes all of it."""
    base = models.base()
    adapter = models.adapter(base)
    store = FolderDestination.store

    def spoilt(self: FolderDestination, file: str, sha256: str | None) -> Any:
        path = self.stage / file
        if file.endswith(".safetensors"):
            tensors = load_file(path)
            for key in (key for key in tensors if name in key):
                tensors[key][..., -1] += 0.5
            save_file(tensors, path, {"format": "pt"})
        return store(self, file, sha256)

    monkeypatch.setattr(FolderDestination, "store", spoilt)
    with pytest.raises(Fault, match="merged logits differ"):
        merge(base, [(adapter, 1.0)], tmp_path / "merged")


def test_a_wrong_result_is_not_published(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.base()
    adapter = models.adapter(base)
    monkeypatch.setattr("trimtab_trainer.merge.adapter.LowRank", _twice())
    with pytest.raises(Fault) as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "merged")
    assert caught.value.reason is Reason.ASSERTION_FAILED
    assert "logits differ" in caught.value.message
    assert not (tmp_path / "merged" / "manifest.json").exists()


def test_a_tolerance_that_is_given_counts(models: Models, tmp_path: Path) -> None:
    base = models.base(dtype=torch.bfloat16)
    with pytest.raises(Fault, match="allowed are 1e-07"):
        merge(base, [(models.adapter(base), 1.0)], tmp_path / "merged", tolerance=1e-7)


def _twice() -> Any:
    from trimtab_trainer.merge.update import LowRank

    return lambda left, right, scaling, transposed=False: LowRank(left, right, 2 * scaling, transposed)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
