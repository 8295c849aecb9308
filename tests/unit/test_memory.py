"""The estimate of memory against published figures, and what a run that cannot fit is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trimtab_api import memory
from trimtab_api.memory import GiB, Shape, Way
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec

GB = 10**9
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3B = {
    "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # fmt: skip
LORA, FULL = Way("lora", rows=1, length=2048), Way("full", rows=1, length=2048)


def shape(config: dict[str, Any]) -> Shape:
    found = memory.shape_of(config)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN, 7_615_616_512),
        (LLAMA_3B, 3_212_749_824),
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}, 123_000_000),
        (
            {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
             "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
             "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144},
            30_532_000_000,
        ),
    ],
    ids=["Qwen2.5-7B", "Llama-3.2-3B", "gpt2", "Qwen3-30B-A3B"],
)  # fmt: skip
def test_parameters_of_known_models(config: dict[str, Any], parameters: int) -> None:
    assert shape(config).parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("way", "least", "most"),
    [
        (LORA, 15 * GB, 18 * GB),
        (replace(LORA, bits=4), 6 * GB, 9 * GB),
        (replace(FULL, pure=True), 8 * 7.6 * GB, 76 * GiB),
        (FULL, 16 * 7.6 * GB, 19 * 7.6 * GB),
        (replace(FULL, strategy="zero3", processes=8), 16 * 7.6 * GB / 8, 26 * GB),
        (replace(FULL, optimizer="adamw8bit"), 10 * 7.6 * GB, 14 * 7.6 * GB),
    ],
    ids=["LoRA", "QLoRA", "full in bfloat16", "full in float32", "ZeRO-3 on eight", "8-bit optimiser"],
)
def test_a_model_of_7b_takes_what_is_published(way: Way, least: float, most: float) -> None:
    assert least <= memory.estimate(shape(QWEN), way).total_bytes <= most


def test_full_tuning_in_float32_takes_16_bytes_a_weight() -> None:
    found, sizes = memory.estimate(shape(QWEN), FULL), shape(QWEN)
    assert found.weights_bytes + found.gradients_bytes + found.optimizer_bytes == 16 * sizes.parameters


def test_peft_benchmark() -> None:
    """Llama-3.2-3B, bfloat16, batches of 4 rows of up to 768 tokens, full tuning: 38.9 GB at most."""
    way = replace(FULL, rows=4, length=768, pure=True, checkpointing=False, fused_head=False)
    assert memory.estimate(shape(LLAMA_3B), way).total_bytes == pytest.approx(38.9 * GB, rel=0.15)


def test_unknown_architectures_are_not_guessed() -> None:
    assert memory.shape_of({"model_type": "mamba", "state_size": 16}) is None


def test_a_run_that_cannot_fit_is_told_what_would() -> None:
    assert memory.shortage(shape(QWEN), LORA, 24 * GiB) is None
    short = memory.shortage(shape(QWEN), replace(LORA, rows=8), 12 * GiB)
    assert short is not None
    assert "are needed for each device, 12.0 GiB are there" in short[0]
    assert "model.quantization: {method: bnb4}" in short[1]
    full = memory.shortage(shape(QWEN), replace(FULL, processes=8, strategy="ddp"), 40 * GiB)
    assert full is not None
    assert full[1].startswith("Any of these makes it fit: distributed.strategy: zero3")


def test_each_change_saves_what_it_says() -> None:
    way = replace(FULL, rows=4, checkpointing=False, processes=4, strategy="zero1")
    before = memory.estimate(shape(QWEN), way).total_bytes
    saved = dict(memory.changes(shape(QWEN), way))
    assert list(saved)[:2] == ["training.gradientCheckpointing: true", "training.perDeviceBatchSize: 2"]
    less = memory.estimate(shape(QWEN), replace(way, checkpointing=True)).total_bytes
    assert saved["training.gradientCheckpointing: true"] == before - less > 0


def test_a_spec_becomes_a_way() -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "method": "sft",
            "model": {"from": {"huggingFace": {"repo": "acme/qwen"}}},
            "dataset": {"train": [{"from": {"inline": "{}"}}], "maxLength": 4096},
            "tuner": {"lora": {"rank": 16, "modulesToSave": ["embeddings"]}},
            "training": {"perDeviceBatchSize": 2, "optimizer": "lion", "gradientCheckpointing": False},
            "pod": {"resources": {"limits": {"nvidia.com/gpu": 2}}},
        }
    )
    way = memory.way_of(spec, resolve(spec), shape(QWEN))
    assert (way.rows, way.length, way.rank, way.width, way.processes) == (2, 4096, 16, 2, 2)
    assert (way.optimizer, way.checkpointing, way.accelerated) == ("lion", False, True)
    assert way.extra_trainable == 152064 * 3584


@pytest.mark.parametrize(
    ("method", "tuner", "knobs", "held"),
    [
        ("dpo", "full", {}, True),
        ("dpo", "full", {"distributed": {"strategy": "zero2", "nodes": 2}}, True),
        ("dpo", "full", {"distributed": {"strategy": "fsdp2", "nodes": 2}}, True),
        ("dpo", "lora", {}, False),
        ("dpo", "full", {"dpo": {"precomputeRefLogProbs": True}}, False),
        ("dpo", "full", {"dpo": {"refModel": {"fineTuneJob": {"name": "other"}}}}, False),
        ("kto", "full", {}, True),
        ("simpo", "full", {}, False),
    ],
)
def test_a_reference_is_counted_where_one_is_held(method: str, tuner: str, knobs: dict[str, Any], held: bool) -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "method": method,
            "model": {"from": {"fineTuneJob": {"name": "base"}}, "dtype": "bfloat16"},
            "dataset": {"train": [{"from": {"inline": "{}"}}]},
            "tuner": {"type": tuner},
            **knobs,
        }
    )
    way = memory.way_of(spec, resolve(spec), shape(QWEN))
    assert way.reference is held
    alone = memory.estimate(shape(QWEN), replace(way, reference=False)).weights_bytes
    weights = memory.estimate(shape(QWEN), way).weights_bytes
    assert weights == (2 * alone if held else alone)


def test_a_shared_sequence_leaves_each_process_its_part() -> None:
    alone = memory.activations(shape(QWEN), replace(LORA, length=32768))
    shared = memory.activations(shape(QWEN), replace(LORA, length=32768, shared=4))
    assert shared == pytest.approx(alone / 4)


JUDGE = {"from": {"fineTuneJob": {"name": "judge"}}}
SPOKEN: dict[str, dict[str, Any]] = {
    "grpo": {"rewards": [{"rewardModel": JUDGE}, {"name": "format"}], "maxCompletionLength": 100},
    "ppo": {"rewardModel": JUDGE, "responseLength": 100},
    "gkd": {"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "maxCompletionLength": 100},
}


def spoken(method: str, strategy: str, tuner: str, rollout: Any = None, **knobs: Any) -> Way:
    """How a method that draws answers of up to 100 tokens trains on two processes."""
    spec = FineTuneJobSpec.model_validate(
        {
            "method": method,
            "model": {"from": {"fineTuneJob": {"name": "base"}}, "dtype": "bfloat16"},
            "dataset": {"train": [{"from": {"inline": "{}"}}], "maxLength": 64},
            "tuner": {"type": tuner},
            "distributed": {"strategy": strategy, "nodes": 2},
            method: {**SPOKEN[method], **knobs},
            **({} if rollout is None else {"rollout": rollout}),
        }
    )
    return memory.way_of(spec, resolve(spec), shape(QWEN))


@pytest.mark.parametrize(
    ("method", "strategy", "tuner", "models"),
    [
        # In models of 16 bit: the tuned one, the one as it was or the teacher, the judge; split ones count half.
        ("grpo", "ddp", "lora", 1 + 0 + 1),
        ("grpo", "zero3", "lora", 1 / 2 + 0 + 1),
        ("grpo", "zero2", "full", 1 + 1 + 1),
        ("grpo", "zero3", "full", 1 / 2 + 1 / 2 + 1),
        ("ppo", "zero3", "full", 1 / 2 + 1 / 2 + 1),
        ("gkd", "zero2", "full", 1 + 1),
        ("gkd", "zero3", "full", 1 / 2 + 1 / 2),
        ("gkd", "ddp", "lora", 1 + 1),
    ],
)
def test_models_beside_the_tuned_one(method: str, strategy: str, tuner: str, models: float) -> None:
    way, whole = spoken(method, strategy, tuner), shape(QWEN).parameters * 2
    assert way.length == 164
    assert memory.estimate(shape(QWEN), way).weights_bytes == pytest.approx(models * whole, rel=0.02)


def test_no_divergence_needs_no_model_as_it_was() -> None:
    assert spoken("grpo", "zero3", "full").reference
    assert not spoken("grpo", "zero3", "full", beta=0).reference


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize(("strategy", "whole"), [("zero3", True), ("fsdp2", True), ("zero2", False), ("ddp", False)])
def test_whoever_speaks_holds_the_weights_whole(strategy: str, whole: bool, tuner: str) -> None:
    way, weights = spoken("grpo", strategy, tuner), shape(QWEN).parameters * 2
    found = memory.estimate(shape(QWEN), way).activations_bytes
    silent = memory.estimate(shape(QWEN), replace(way, speaks=False)).activations_bytes
    if whole:
        assert found == pytest.approx(weights, rel=0.02)
        assert found > silent
    else:
        assert found == silent
    assert not spoken("gkd", strategy, tuner, lmbda=0).speaks
    beside = spoken("grpo", strategy, tuner, rollout={"engine": "vllm"})
    assert not beside.speaks
    # What the rules refuse with it, or would cut answers as well, is no way out.
    told = " ".join(words for words, _ in memory.changes(shape(QWEN), replace(beside, length=4096, accelerated=True)))
    assert "quantization" not in told
    assert "maxLength" not in told


def test_shared_layers_leave_each_process_its_part() -> None:
    sizes = shape(QWEN)
    alone, shared = (memory.estimate(sizes, replace(FULL, tensor=n, processes=n, strategy="ddp")) for n in (1, 4))
    assert shared.weights_bytes == pytest.approx(4 * (sizes.linear / 4 + sizes.parameters - sizes.linear), rel=1e-6)
    assert shared.optimizer_bytes == 2 * shared.weights_bytes < alone.optimizer_bytes / 2
    mixture = replace(sizes, experts=8, inner=1024)
    experts = memory.estimate(mixture, replace(FULL, expert=8, processes=8, strategy="ddp"))
    assert experts.weights_bytes == pytest.approx(4 * (mixture.parameters - mixture.mixture * 7 / 8), rel=1e-6)
