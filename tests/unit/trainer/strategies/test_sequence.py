"""Sequences that two processes share: losses, gradients and artifacts as of one process, exact resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import proves
from tests.unit.trainer.conftest import SCRATCH, StartRanks, chats, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from tests.unit.trainer.strategies.test_matrix import TUNERS, Matrix
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, RunConfig
from trimtab_api.resolve import resolve
from trimtab_trainer import strategies
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.causal import Collator
from trimtab_trainer.strategies import sequence
from trimtab_trainer.strategies.shareable import see_shareable

STEPS = 4
TUNED = ("full-ddp", "full-zero1", "full-zero2", "full-zero3", "full-fsdp2", "lora-zero3", "lora-fsdp2")
QUANTISED = ("qlora-zero3", "qlora-fsdp2")
RESUMED = ("full-zero3", "lora-fsdp2")
"""Interrupted after half of the steps, by a signal to the last process."""
ROWS = {"train": [{"from": {"inline": chats(count=22)}}], "maxLength": 128}
"""Of unequal lengths, and in no whole number of batches."""
WEIGHED: dict[str, Any] = {
    "train": [
        {
            "from": {
                "inline": json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": "the weather?"},
                            {"role": "tool_call", "content": json.dumps({"name": "look", "arguments": {"at": "sky"}})},
                            {"role": "tool_response", "content": "blue"},
                            {"role": "assistant", "content": "It is blue."},
                        ]
                    }
                )
                + "\n"
                + chats(count=15)
            }
        }
    ],
    "maxLength": 128,
    "toolCallWeight": 3.0,
}
ADDED: dict[str, dict[str, Any]] = {
    "weighed": {"tuner": {"type": "full"}, "dataset": WEIGHED},
    "validated": {
        "tuner": {"type": "full"},
        "dataset": {**ROWS, "validation": [{"from": {"inline": chats("Something else.", count=7)}}]},
        "training": {"evalSteps": 2, "gradientCheckpointing": True},
        "evaluation": {"generate": {"maxNewTokens": 3}},
    },
    "streamed": {"tuner": {"type": "full"}, "dataset": {**ROWS, "streaming": {}, "shuffle": False}},
}


def cell(root: Path, tuned: str, strategy: str = "", name: str = "", method: str = "sft") -> RunConfig:
    """Four steps of four rows; the same rows in the same order, whatever the number of processes."""
    fields = {"dataset": ROWS, **{**TUNERS, **ADDED}[tuned]}
    plan = training(maxSteps=STEPS, perDeviceBatchSize=4, gradientAccumulationSteps=2, **fields.pop("training", {}))
    spread: dict[str, Any] = {"processesPerNode": 2, "strategy": strategy, "parallel": {"sequence": 2}}
    wanted = spec(method, training=plan, distributed=spread if strategy else {}, checkpoint={"saveSteps": 2}, **fields)
    name = name or "-".join(part for part in (tuned, strategy) if part)
    return run_config(wanted, root / name, name=name, model=root / "base/artifact")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("sequences")
    base = run_config(spec(model={"scratch": SCRATCH}), root / "base", name="base")
    alone = [Cell(cell(root, tuned)) for tuned in ("full", "lora", "qlora", *ADDED)]
    together = [Cell(cell(root, *name.split("-"))) for name in (*TUNED, *QUANTISED)]
    together += [Cell(cell(root, tuned, "zero2")) for tuned in ADDED]
    for name in RESUMED:
        config = cell(root, *name.split("-"), f"again-{name}")
        together += [Cell(config, stop_after=2, key=f"stopped-{name}"), Cell(config)]
    streamed = cell(root, "streamed", "zero2", "again-streamed-zero2")
    together += [Cell(streamed, stop_after=2, key="stopped-streamed-zero2"), Cell(streamed)]
    return Matrix(root, run_all(Cell(base), alone, together, root / "work", 600))


pytestmark = pytest.mark.timeout(700)


def course(matrix: Matrix, name: str, key: str = "loss") -> list[float]:
    """What was logged under a name, of a run that ended well."""
    ending = matrix.endings[name]
    assert ending.reason is Reason.SUCCEEDED, (ending, log(matrix.root / "work"))
    entries = json.loads((matrix.root / name / "report/history.json").read_text())
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.parametrize("name", [*TUNED, *QUANTISED, *(f"{each}-zero2" for each in ADDED)])
@proves("sft", "sequence")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, name: str) -> None:
    alone = name.split("-")[0]
    assert course(matrix, name) == pytest.approx(course(matrix, alone), abs=2e-4)
    # Adam makes the same steps of gradients of another size.
    rounded = {"rel": 2e-2 if alone == "qlora" else 1e-3}
    assert course(matrix, name, "grad_norm") == pytest.approx(course(matrix, alone, "grad_norm"), **rounded)
    assert len(course(matrix, name)) == STEPS
    wanted, found = matrix.weights(alone), matrix.weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=0)


def test_validation_rows_come_to_the_same_and_are_answered(matrix: Matrix) -> None:
    """As under ddp a batch of another size is another mean of means."""
    alone, found = (course(matrix, name, "eval_loss") for name in ("validated", "validated-zero2"))
    assert len(alone) == 2
    assert found == pytest.approx(alone, abs=5e-3)
    answered = matrix.endings["validated-zero2"].predictions
    assert answered is not None
    assert answered.rows == 7


@pytest.mark.parametrize("name", [*RESUMED, "streamed-zero2"])
@proves("sft", "sequence")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, name: str) -> None:
    stopped = matrix.endings[f"stopped-{name}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 2), (stopped, log(matrix.root / "work"))
    assert course(matrix, f"again-{name}") == course(matrix, name)
    calm, resumed = matrix.weights(name), matrix.weights(f"again-{name}")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in calm.items())


def test_the_parts_of_a_batch_are_the_batch() -> None:
    """Each token is in one part, counts once, and knows what comes next, also where that is in another part."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "weights": [1.0, 1.0, 3.0, 1.0, 2.0]},
        {"input_ids": [4, 3], "labels": [-100, 3], "weights": []},
    ]
    whole = Collator(0, multiple=2)([{**row, "weights": row["weights"] or [1.0] * 2} for row in rows])
    parts = [sequence.Part(rank=rank, size=2, row=0, rows=1, group=None).of(whole) for rank in (0, 1)]
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0] if name != "tokens"}
    assert torch.equal(joined["input_ids"], whole["input_ids"])
    assert joined["input_ids"].shape == (2, 6)
    assert joined["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert joined["shift_labels"].tolist() == [[-100, 7, 8, 9, -100, -100], [3, -100, -100, -100, -100, -100]]
    assert joined["weights"].tolist()[0] == [1, 3, 1, 2, 1, 1]
    assert [int(part["tokens"]) for part in parts] == [5, 2]


@pytest.mark.timeout(300)
@proves("pretrain", "sequence")
def test_two_groups_of_two_take_rows_of_their_own(start_ranks: StartRanks, tmp_path: Path) -> None:
    """Held against one process: the rows of a step are those of both groups."""
    found = []
    for world in (1, 4):
        out = tmp_path / f"out-{world}"
        spread = {"processesPerNode": 4, "parallel": {"sequence": 2}} if world == 4 else {}
        plan = training(maxSteps=3, perDeviceBatchSize=4 if world == 1 else 2)
        config = run_config(spec(dataset=ROWS, training=plan, distributed=spread), out, name="job")
        assert config.resolved.global_batch_size == 4
        ranks = start_ranks(config)
        assert ranks.end().exit is Exit.OK, ranks.log
        entries = json.loads((out / "report/history.json").read_text())
        found.append([entry[key] for entry in entries if "loss" in entry for key in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("described", "size", "said"),
    [
        (LLAMA, 4, None),
        ({"num_attention_heads": 8}, 8, None),
        (LLAMA, 3, "its 8 attention heads are no multiple of 3"),
        (LLAMA, 8, "its 4 key heads are no multiple of 8"),
        ({**LLAMA, "sliding_window": 512}, 2, "ends after 512 tokens, and dataset.maxLength is 1024"),
        ({**LLAMA, "sliding_window": 512, "use_sliding_window": False}, 2, None),
        ({**LLAMA, "sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, 2, None),
        ({**LLAMA, "attention_chunk_size": 256}, 2, "ends after 256 tokens"),
        ({**LLAMA, "layer_types": ["linear_attention", "full_attention"]}, 2, "layers of linear_attention"),
        ({"text_config": LLAMA, "vision_config": {}}, 2, "it sees or hears"),
        ({"text_config": LLAMA}, 2, None),
    ],
)
def test_which_models_can_be_shared(described: dict[str, Any], size: int, said: str | None) -> None:
    if said is None:
        see_shareable(described, size, 1024)
        return
    with pytest.raises(Fault) as caught:
        see_shareable(described, size, 1024)
    assert said in caught.value.message


@pytest.mark.parametrize(("processes", "shared", "rows"), [(8, 1, 16), (8, 2, 16), (8, 8, 16), (2, 2, 16)])
def test_rows_of_a_step_are_those_of_groups(processes: int, shared: int, rows: int) -> None:
    resolved = resolve(spec("sft", training={}, distributed={"nodes": processes, "parallel": {"sequence": shared}}))
    assert resolved.gradient_accumulation_steps == 16 // (processes // shared)
    assert (resolved.global_batch_size, resolved.world_size) == (rows, processes)


def test_a_sequence_is_not_shared_by_more_than_there_are(tmp_path: Path) -> None:
    config = run_config(spec("sft", distributed={"nodes": 3, "parallel": {"sequence": 2}}), tmp_path)
    with pytest.raises(Fault, match="2 processes cannot share a sequence where there are 3"):
        strategies.see_possible(config)
