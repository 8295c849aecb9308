"""Every way to spread a run, full, LoRA and quantised: losses as of one process, exact resumes, whole artifacts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.matrix import proves
from tests.unit.trainer.conftest import SCRATCH, chats, history, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, RunConfig
from trimtab_trainer import yamlfile
from trimtab_trainer.merge.job import merge

EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "ways"
SPLIT = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TUNED = ("full", "lora", "qlora")
STEPS = 4
BASE: dict[str, Any] = {"from": {"fineTuneJob": {"name": "base"}}}
LORA = {"type": "lora", "lora": {"dropout": 0.0}}
RESUMED = ("zero2-full", "zero3-full", "zero3-lora", "fsdp2-full", "fsdp2-qlora")
"""Interrupted after half of the steps, by a signal to the last process."""


def quantised(method: str = "bnb4", **settings: Any) -> dict[str, Any]:
    """A model block with weights in few bits."""
    return {**BASE, "quantization": {"method": method, **settings}}


INLINE: dict[str, Any] = {"train": [{"from": {"inline": chats()}}]}
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner": {"type": "full"}},
    "lora": {"tuner": LORA},
    "qlora": {"tuner": LORA, "model": quantised()},
    "qlora8": {"tuner": LORA, "model": quantised("bnb8")},
    "pure": {"tuner": {"type": "full"}, "training": {"pureBf16": True}},
    "half": {
        "tuner": {"type": "full"},
        "model": {**BASE, "dtype": "bfloat16"},
        "dataset": {**INLINE, "validation": INLINE["train"], "maxLength": 128},
        "training": {"evalSteps": 2},
    },
}


@dataclass
class Matrix:
    """All runs of this module."""

    root: Path
    endings: dict[str, Ending]

    def losses(self, name: str) -> list[float]:
        """The loss of each step of a run that ended well."""
        ending = self.endings[name]
        assert ending.reason is Reason.SUCCEEDED, (ending, log(self.root / "work"))
        return [loss for _, loss in history(self.root / name)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The artifact's tensors."""
        files = list((self.root / name / "artifact").glob("*.safetensors"))
        assert len(files) == 1
        return load_file(files[0])


def cell(root: Path, tuned: str, strategy: str | None = None, name: str | None = None, **distributed: Any) -> RunConfig:
    """A run of four steps on the same rows in the same order, whatever the number of processes."""
    world = 1 if strategy is None or strategy == "deviceMap" else 2
    fields = dict(TUNERS[tuned])
    plan = training(
        maxSteps=STEPS, perDeviceBatchSize=4 // world, gradientAccumulationSteps=2, **fields.pop("training", {})
    )
    spread = {"processesPerNode": world, **({} if strategy is None else {"strategy": strategy}), **distributed}
    wanted = spec("sft", training=plan, distributed=spread, checkpoint={"saveSteps": 2}, **fields)
    name = name or (tuned if strategy is None else f"{strategy}-{tuned}")
    return run_config(wanted, root / name, name=name, model=root / "base/artifact")


def example(root: Path, name: str) -> RunConfig:
    """A file of examples/ways, with the base of this module."""
    _, wanted = yamlfile.read(EXAMPLES / f"{name}.yaml")
    return run_config(wanted, root / f"example-{name}", name=f"example-{name}", model=root / "base/artifact")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("matrix")
    base = run_config(spec(model={"scratch": SCRATCH}), root / "base", name="base")
    alone = [Cell(cell(root, tuned)) for tuned in TUNERS]
    alone += [
        Cell(cell(root, "lora", "deviceMap")),
        Cell(example(root, "qlora")),
    ]
    together = [Cell(cell(root, tuned, strategy)) for strategy in SPLIT for tuned in TUNED]
    together += [
        Cell(cell(root, "qlora8", "zero2")),
        Cell(cell(root, "pure", "zero2")),
        Cell(cell(root, "half", "zero3")),
        Cell(cell(root, "half", "fsdp2")),
        Cell(cell(root, "full", "zero2", "zero2-offloaded", offload={"optimizer": True})),
        Cell(cell(root, "full", "zero3", "zero3-offloaded", offload={"optimizer": True, "parameters": True})),
        Cell(cell(root, "full", "fsdp2", "fsdp2-offloaded", offload={"parameters": True})),
        Cell(example(root, "zero3")),
        Cell(example(root, "fsdp2")),
    ]
    for name in RESUMED:
        strategy, tuned = name.split("-")
        config = cell(root, tuned, strategy, f"again-{name}")
        together += [Cell(config, stop_after=2, key=f"stopped-{name}"), Cell(config)]
    together += [
        Cell(cell(root, "full", "zero3", "zero3-full"), key="finished-zero3-full"),
        Cell(cell(root, "lora", "fsdp2", "fsdp2-lora"), key="finished-fsdp2-lora"),
        Cell(cell(root, "full", "zero2", "zero3-full"), key="other-strategy"),
    ]
    return Matrix(root, run_all(Cell(base), alone, together, root / "work", 1100))


pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("tuned", TUNED)
@pytest.mark.parametrize("strategy", SPLIT)
@proves("sft", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, strategy: str, tuned: str) -> None:
    name = f"{strategy}-{tuned}"
    alone = matrix.losses(tuned)
    assert len(alone) == STEPS
    assert alone[0] - alone[-1] > 0.02
    assert matrix.losses(name) == pytest.approx(alone, abs=2e-4)
    assert matrix.endings[name].artifact is not None
    wanted, found = matrix.weights(tuned), matrix.weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=2e-3, rtol=0)
    config = json.loads((matrix.root / name / "artifact" / "args.json").read_text())
    assert config["resolved"]["strategy"] == strategy


@pytest.mark.parametrize(
    ("name", "alone", "near"),
    [
        ("zero2-qlora8", "qlora8", 2e-4),
        ("deviceMap-lora", "lora", 1e-6),
        ("zero2-offloaded", "full", 2e-4),
        ("zero3-offloaded", "full", 2e-4),
        ("fsdp2-offloaded", "full", 2e-4),
        ("half", "full", 2e-2),
        ("zero3-half", "half", 2e-2),
        ("fsdp2-half", "half", 2e-2),
        ("pure", "full", 5e-2),
        ("zero2-pure", "pure", 5e-2),
        ("qlora", "lora", 5e-2),
        ("qlora8", "lora", 5e-2),
    ],
)
def test_what_goes_another_way_comes_to_the_same(matrix: Matrix, name: str, alone: str, near: float) -> None:
    assert matrix.losses(name) == pytest.approx(matrix.losses(alone), abs=near)


@pytest.mark.parametrize("name", ["zero3-half", "fsdp2-half"])
def test_validation_rows_come_to_the_same(matrix: Matrix, name: str) -> None:
    def evaluated(run: str) -> list[float]:
        entries = json.loads((matrix.root / run / "report/history.json").read_text())
        return [entry["eval_loss"] for entry in entries if "eval_loss" in entry]

    matrix.losses(name)
    assert len(evaluated("half")) == 2
    assert evaluated(name) == pytest.approx(evaluated("half"), abs=2e-2)


def test_quantising_has_an_effect(matrix: Matrix) -> None:
    assert matrix.losses("qlora") != matrix.losses("lora")
    assert matrix.losses("qlora8") != matrix.losses("lora")
    assert matrix.losses("pure") != matrix.losses("full")


@pytest.mark.parametrize("name", RESUMED)
@proves("sft", "resume")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, name: str) -> None:
    stopped = matrix.endings[f"stopped-{name}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 2), (stopped, log(matrix.root / "work"))
    assert matrix.losses(f"again-{name}") == matrix.losses(name)
    assert matrix.endings[f"again-{name}"].from_step == 2
    calm, resumed = matrix.weights(name), matrix.weights(f"again-{name}")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in calm.items())


@pytest.mark.parametrize("name", ["zero3-full", "fsdp2-lora"])
def test_a_run_with_nothing_left_to_train_publishes_the_same(matrix: Matrix, name: str) -> None:
    ending = matrix.endings[f"finished-{name}"]
    assert (ending.reason, ending.from_step) == (Reason.SUCCEEDED, STEPS), (ending, log(matrix.root / "work"))
    resumed = matrix.weights(f"again-{name}") if f"again-{name}" in matrix.endings else None
    for key, tensor in (resumed or {}).items():
        assert torch.equal(matrix.weights(name)[key], tensor)


def test_a_checkpoint_of_another_strategy_is_refused(matrix: Matrix) -> None:
    ending = matrix.endings["other-strategy"]
    assert ending.reason is Reason.INPUT_CHANGED
    assert "was written by 2 processes under zero3, this run has 2 under zero2" in ending.message


@pytest.mark.parametrize("name", ["qlora", "zero3", "fsdp2"])
def test_examples_run(matrix: Matrix, name: str) -> None:
    assert len(matrix.losses(f"example-{name}")) >= 1


def test_each_process_s_part_is_in_the_checkpoint(matrix: Matrix) -> None:
    manifest = json.loads((matrix.root / "zero3-full/checkpoints/000000004/manifest.json").read_text())
    names = {file["path"] for file in manifest["files"]}
    assert {f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= names
    assert (manifest["madeBy"]["strategy"], manifest["madeBy"]["worldSize"]) == ("zero3", 2)
    assert not [name for name in names if name.endswith((".py", "training_args.bin", ".safetensors"))]
    sharded = json.loads((matrix.root / "fsdp2-full/checkpoints/000000004/manifest.json").read_text())
    assert {"optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp"} <= {
        file["path"] for file in sharded["files"]
    }


def test_what_was_trained_on_quantised_weights_is_folded_into_whole_ones(matrix: Matrix, tmp_path: Path) -> None:
    base, adapter = matrix.root / "base/artifact", matrix.root / "fsdp2-qlora/artifact"
    matrix.losses("fsdp2-qlora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "fineTuneJob/base"
    outcome = merge(base, [(adapter, 1.0)], tmp_path / "merged")
    assert outcome.manifest.made_by["verification"]["method"] == "peft"
    merged, before = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in merged.items()} == {key: each.dtype for key, each in before.items()}
    assert any(not torch.equal(merged[key], before[key]) for key in merged if "q_proj" in key)
