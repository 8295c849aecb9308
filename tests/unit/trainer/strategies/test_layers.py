"""Layers that two processes share, by matrices or by experts: losses and artifacts as of one process, exact resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.matrix import proves
from tests.unit.trainer.conftest import chats, conversation, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from tests.unit.trainer.strategies.test_matrix import Matrix
from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer import strategies
from trimtab_trainer.endings import Fault
from trimtab_trainer.model import tokenizer
from trimtab_trainer.strategies.layers import see_splittable

STEPS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
ROWS: dict[str, Any] = {"train": [{"from": {"inline": chats(count=22)}}], "maxLength": 128}
VALIDATED = {**ROWS, "validation": [{"from": {"inline": chats("Something else.", count=7)}}]}
FIELDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "own": {"dataset": VALIDATED, "training": {"evalSteps": 2, "gradientCheckpointing": True}},
    "half": {"model": {"from": {"fineTuneJob": {"name": "base"}}, "dtype": "bfloat16"}},
    "packed": {"dataset": {**ROWS, "packing": {"length": 128}}},
    "moe": {},
}
BASES = {"tied": "tied", "own": "own", "half": "own", "packed": "own", "moe": "moe"}


def made(folder: Path) -> Path:
    """A tiny model in each of three forms: embeddings that are the head as well, a head of its own, experts."""
    torch.manual_seed(3)
    for name in ("tied", "own", "moe"):
        tokenizer.learn([conversation("who are you?", "I am a test.")], 300, None, None, folder / name)
        loaded: Any = tokenizer.load(folder / name, "base")
        ids = {"vocab_size": len(loaded), "eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
        if name == "moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **ids, **experts, router_aux_loss_coef=0.05))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **ids, tie_word_embeddings=name == "tied"))
        model.save_pretrained(folder / name)
    return folder


def cell(root: Path, kind: str, shared: bool, name: str = "") -> RunConfig:
    """Four steps on the same rows, in one process or in two that share layers."""
    fields = {"dataset": ROWS, **FIELDS[kind]}
    plan = training(maxSteps=STEPS, perDeviceBatchSize=4, gradientAccumulationSteps=2, **fields.pop("training", {}))
    parallel = {"expert": 2} if kind == "moe" else {"tensor": 2}
    spread = {"processesPerNode": 2, "parallel": parallel} if shared else {}
    full = {"tuner": {"type": "full"}, "checkpoint": {"saveSteps": 2}}
    wanted = spec("sft", training=plan, distributed=spread, **full, **fields)
    name = name or (f"shared-{kind}" if shared else kind)
    return run_config(wanted, root / name, name=name, model=root / "bases" / BASES[kind])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("layers")
    made(root / "bases")
    first, *alone = [Cell(cell(root, kind, shared=False)) for kind in FIELDS]
    together = [Cell(cell(root, kind, shared=True)) for kind in FIELDS]
    for kind in ("tied", "moe"):
        config = cell(root, kind, True, f"again-{kind}")
        together += [Cell(config, stop_after=2, key=f"stopped-{kind}"), Cell(config)]
    together += [Cell(cell(root, "tied", True, "again-tied"), key="finished")]
    return Matrix(root, run_all(first, alone, together, root / "work", 600))


def course(matrix: Matrix, name: str, key: str = "loss") -> list[float]:
    """What was logged under a name, of a run that ended well."""
    ending = matrix.endings[name]
    assert ending.reason is Reason.SUCCEEDED, (ending, log(matrix.root / "work"))
    entries = json.loads((matrix.root / name / "report/history.json").read_text())
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("kind", FIELDS)
@proves("sft", "tensor", "expert")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, kind: str) -> None:
    half = kind == "half"
    name = f"shared-{kind}"
    assert course(matrix, name) == pytest.approx(course(matrix, kind), abs=2e-2 if half else 2e-4)
    sizes = course(matrix, kind, "grad_norm")
    assert course(matrix, name, "grad_norm") == pytest.approx(sizes, rel=5e-2 if half else 1e-3)
    assert course(matrix, name, "eval_loss") == pytest.approx(course(matrix, kind, "eval_loss"), abs=2e-4)
    wanted, found = matrix.weights(kind), matrix.weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-2 if half else 2e-3, rtol=0)
    assert "distributed_config" not in json.loads((matrix.root / name / "artifact/config.json").read_text())
    resolved = json.loads((matrix.root / name / "artifact/args.json").read_text())["resolved"]
    assert (resolved["worldSize"], resolved["globalBatchSize"]) == (2, 8)


@pytest.mark.parametrize("kind", ["tied", "moe"])
@proves("sft", "tensor", "expert")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, kind: str) -> None:
    stopped = matrix.endings[f"stopped-{kind}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 2), (stopped, log(matrix.root / "work"))
    assert course(matrix, f"again-{kind}") == course(matrix, f"shared-{kind}")
    calm, resumed = matrix.weights(f"shared-{kind}"), matrix.weights(f"again-{kind}")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in calm.items())


def test_a_run_with_nothing_left_to_train_publishes_the_same(matrix: Matrix) -> None:
    ending = matrix.endings["finished"]
    assert (ending.reason, ending.from_step) == (Reason.SUCCEEDED, STEPS), (ending, log(matrix.root / "work"))
    found = matrix.weights("shared-tied")
    assert all(torch.equal(found[key], tensor) for key, tensor in matrix.weights("again-tied").items())


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("described", "parallel", "said"),
    [
        (LLAMA, {"tensor": 2}, None),
        (LLAMA, {"tensor": 8}, "its 4 key heads are no multiple of 8"),
        ({**LLAMA, "num_experts": 8}, {"tensor": 2}, "it has experts: distributed.parallel.expert shares them"),
        ({**LLAMA, "num_experts": 8}, {"expert": 4}, None),
        ({**LLAMA, "num_local_experts": 6}, {"expert": 4}, "its 6 experts are no multiple of 4"),
        (LLAMA, {"expert": 2}, "its 0 experts are no multiple of 2"),
        ({"text_config": LLAMA, "vision_config": {}}, {"tensor": 2}, "it sees or hears"),
    ],
)
def test_which_models_can_be_shared(
    described: dict[str, Any], parallel: dict[str, int], said: str | None, tmp_path: Path
) -> None:
    config = run_config(spec("sft", distributed={"parallel": parallel}), tmp_path)
    if said is None:
        see_splittable(described, config)
        return
    with pytest.raises(Fault) as caught:
        see_splittable(described, config)
    assert said in caught.value.message


def test_all_processes_share_layers(tmp_path: Path) -> None:
    config = run_config(spec("sft", distributed={"nodes": 4, "parallel": {"tensor": 2}}), tmp_path)
    with pytest.raises(Fault, match="2 processes would share all layers, and there are 4"):
        strategies.see_possible(config)
