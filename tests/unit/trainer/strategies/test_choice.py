"""Which strategy a run gets, who owns a file of a checkpoint, and which quantised models are opened."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.trainer.conftest import SCRATCH, run_config, spec
from trimtab_api.conditions import Reason
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import checkpoint, preflight, strategies
from trimtab_trainer.endings import Fault
from trimtab_trainer.model import quantisation
from trimtab_trainer.strategies import fsdp

FULL = {"tuner": {"type": "full"}}
LARGE = {"model": {"scratch": {**SCRATCH, "hiddenSize": 4096, "layers": 32, "attentionHeads": 32, "keyValueHeads": 8}}}


@pytest.mark.parametrize(
    ("fields", "distributed", "wanted"),
    [
        ({}, {}, "none"),
        (FULL, {}, "none"),
        ({}, {"processesPerNode": 2}, "ddp"),
        ({}, {"nodes": 2}, "ddp"),
        (FULL, {"nodes": 2}, "zero2"),
        ({"model": {"scratch": SCRATCH}}, {"nodes": 2}, "ddp"),
        (LARGE, {"nodes": 2}, "zero2"),
        ({}, {"processesPerNode": 2, "strategy": "zero3"}, "zero3"),
        ({}, {"strategy": "fsdp2"}, "none"),
        ({}, {"strategy": "zero2"}, "none"),
        (FULL, {"strategy": "zero2", "offload": {"optimizer": True}}, "zero2"),
        ({}, {"strategy": "deviceMap"}, "deviceMap"),
        ({"pod": {"resources": {"limits": {"nvidia.com/gpu": 4}}}}, {"strategy": "deviceMap"}, "deviceMap"),
        ({"pod": {"resources": {"limits": {"nvidia.com/gpu": 4}}}, **FULL}, {}, "zero2"),
    ],
)
def test_what_auto_becomes(fields: dict[str, Any], distributed: dict[str, Any], wanted: str) -> None:
    resolved = resolve(spec("sft", **fields, distributed=distributed))
    assert resolved.strategy == wanted
    assert wanted != "deviceMap" or resolved.world_size == 1


@pytest.mark.parametrize("method", ["dpo", "embedding", "gkd"])
def test_auto_is_the_same_for_every_method(method: str) -> None:
    assert resolve(spec(method, **FULL, distributed={"nodes": 2})).strategy == "zero2"


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_its_name_is_the_spec_s(strategy: str, tmp_path: Path) -> None:
    wanted = spec("sft", distributed={"strategy": strategy, "processesPerNode": 2})
    assert strategies.of(run_config(wanted, tmp_path)).name == strategy


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("rng_state_3.pth", 3),
        ("rng_state.pth", 0),
        ("window_12.json", 12),
        ("global_step40/zero_pp_rank_2_mp_rank_00_optim_states.pt", 2),
        ("global_step40/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", 2),
        ("global_step40/zero_pp_rank_1_mp_rank_00_model_states.pt", 1),
        ("global_step40/mp_rank_00_model_states.pt", 0),
        ("optimizer_0/__5_0.distcp", 5),
        ("pytorch_model_fsdp_0/__11_1.distcp", 11),
        ("pytorch_model_fsdp_0/.metadata", 0),
        ("optimizer.pt", 0),
    ],
)
def test_each_file_of_a_checkpoint_has_one_owner(name: str, owner: int) -> None:
    assert checkpoint.owner(name) == owner


def test_a_missing_part_of_the_optimiser_is_noticed() -> None:
    wanted = {"global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"}
    there = {"rng_state.pth", "window_0.json", "trainer_state.json", "latest"}
    with pytest.raises(Fault) as caught:
        checkpoint.see_whole(there, 1, wanted, "s3://b/c")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt is missing" in caught.value.message


@pytest.mark.parametrize("processes", [1, 2])
def test_offloading_needs_something_to_split(processes: int, tmp_path: Path) -> None:
    wanted = spec(
        "sft", distributed={"strategy": "fsdp2", "processesPerNode": processes, "offload": {"parameters": True}}
    )
    config = run_config(wanted, tmp_path)
    if processes == 2:
        strategies.see_possible(config)
        return
    with pytest.raises(Fault, match="splits over several processes, and there is one"):
        strategies.see_possible(config)


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SHARED = {**BNB4, "bnb_4bit_quant_storage": "bfloat16"}


def _wanted(strategy: str = "auto", **fields: Any) -> FineTuneJobSpec:
    return spec("sft", distributed={"strategy": strategy, "processesPerNode": 2}, **fields)


@pytest.mark.parametrize(
    ("settings", "wanted", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, _wanted(), "is quantised with gptq: its kernels (gptqmodel)"),
        ({"quant_method": "awq"}, _wanted(), "quantised with awq"),
        ({"quant_method": "aqlm"}, _wanted(), "quantised with aqlm"),
        ({"quant_method": "eetq"}, _wanted(), "quantised with eetq: its kernels are fetched"),
        ({"quant_method": "hqq"}, _wanted(), "quantised with hqq: transformers no longer opens it"),
        ({"quant_method": "mxfp4"}, _wanted(), "quantised with mxfp4: it has no backward pass here"),
        ({}, _wanted(), "quantised with unknown"),
        (BNB4, _wanted(**FULL), "quantised weights cannot move"),
        (BNB4, _wanted(model={"from": {"fineTuneJob": {"name": "b"}}, "quantization": {"method": "bnb4"}}), "already"),
        (BNB4, _wanted("zero3"), "zero3 cannot split model.from"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _wanted("fsdp2"), "fsdp2 cannot split model.from"),
    ],
)
def test_a_quantised_model_that_cannot_be_trained(
    settings: dict[str, Any], wanted: FineTuneJobSpec, said: str, tmp_path: Path
) -> None:
    with pytest.raises(Fault) as caught:
        quantisation.see_trainable(
            {"quantization_config": settings}, run_config(wanted, tmp_path), "model.from", "s3://b"
        )
    assert said in caught.value.message
    assert caught.value.reason in (Reason.MODEL_INVALID, Reason.SPEC_INVALID)
    assert "quantised" in caught.value.hint or "model.quantization" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (BNB4, _wanted()),
        (SHARED, _wanted("fsdp2")),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _wanted("zero2")),
    ],
)
def test_a_quantised_model_that_can(settings: dict[str, Any], wanted: FineTuneJobSpec, tmp_path: Path) -> None:
    quantisation.see_trainable({"quantization_config": settings}, run_config(wanted, tmp_path), "model.from", "s3://b")


def test_the_preflight_looks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
    )
    (folder / "model.safetensors").touch()
    with pytest.raises(Fault, match="quantised with awq"):
        preflight.check(run_config(spec("sft"), tmp_path / "out", model=folder), tmp_path / "look")


def test_a_reference_is_split_layer_by_layer() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fsdp.split_layers(model, SimpleNamespace(fsdp_plugin_args={}))
    finally:
        dist.destroy_process_group()
    assert [isinstance(layer, FSDPModule) for layer in model.model.layers] == [True, True]
    assert not isinstance(model, FSDPModule)
