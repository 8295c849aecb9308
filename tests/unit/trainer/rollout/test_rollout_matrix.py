"""Every way to spread a run whose model speaks, full, LoRA and quantised: what it says and learns is as under ddp."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.matrix import proves
from tests.unit.trainer.conftest import run_config, spec, training
from tests.unit.trainer.rollout.conftest import answered, prompts
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, ModelInput, RunConfig

METHODS = ("grpo", "ppo", "gkd")
SPREAD = {"full": ("zero2", "zero3", "fsdp2"), "lora": ("fsdp2",), "qlora": ("zero3", "fsdp2")}
CELLS = [
    *(f"{method}-{tuned}-{way}" for method in METHODS for tuned, ways in SPREAD.items() for way in ways),
    "ppo-qlora8-zero1",
]
"""Each is held against ddp."""
NARROW = ["grpo-half-zero3", "ppo-half-zero3", "ppo-half-fsdp2", "gkd-pure-zero3", "grpo-pure-zero2"]
"""Full tuning in bfloat16, with float32 weights for the optimiser or without, and with rows to validate on."""
RESUMED = ("grpo-full-zero3", "ppo-lora-fsdp2", "gkd-qlora-zero3")
"""Interrupted after the first step, which for ppo is in the middle of a round, by a signal to the last process."""
STEPS = 3
JUDGE = {"from": {"fineTuneJob": {"name": "taste"}}}
KNOBS: dict[str, dict[str, Any]] = {
    "grpo": {
        "rewards": [{"name": "accuracy"}, {"rewardModel": JUDGE, "weight": 0.2}],
        "numGenerations": 4,
        "maxCompletionLength": 4,
        "beta": 0.1,
    },
    "ppo": {"rewardModel": JUDGE, "epochs": 2, "responseLength": 4},
    "gkd": {"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "lmbda": 0.5, "maxCompletionLength": 4},
}
FURTHER = {
    "grpo": "grpo.rewards[1].rewardModel.from",
    "ppo": "ppo.rewardModel.from",
    "gkd": "gkd.teacher.from",
}
TOLD = {"grpo": ("reward", "loss"), "ppo": ("reward", "value_loss"), "gkd": ("answer_length", "divergence")}
"""What the model's answers earned or were, and what was learnt from them."""


@dataclass
class Matrix:
    """All runs of this module."""

    root: Path
    endings: dict[str, Ending]

    def told(self, name: str) -> list[float]:
        """The method's figures at each log line of a run that ended well."""
        ending = self.endings[name]
        assert ending.reason is Reason.SUCCEEDED, (ending, log(self.root / "work"))
        entries = json.loads((self.root / name / "report/history.json").read_text())
        keys = TOLD[name.split("-")[name.startswith("again")]]
        return [entry[key] for key in keys for entry in entries if key in entry]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The artifact's tensors."""
        (path,) = (self.root / name / "artifact").glob("*.safetensors")
        return load_file(path)


@dataclass
class Models:
    """What runs begin from, and what stands beside it."""

    base: Path
    beside: dict[str, Path]


def cell(root: Path, models: Models, run: str, name: str | None = None) -> RunConfig:
    """The run METHOD-TUNED-STRATEGY; `one` is a single process."""
    method, tuned, way = run.split("-")
    world = 1 if way in ("one", "deviceMap") else 2
    rows = {"grpo": 8, "ppo": 4, "gkd": 4}[method] // world
    narrow, adapted = tuned in ("half", "pure"), "lora" in tuned
    model: dict[str, Any] = {"from": {"fineTuneJob": {"name": "base"}}, "dtype": "bfloat16" if narrow else "auto"}
    if tuned.startswith("qlora"):
        model["quantization"] = {"method": "bnb8" if tuned == "qlora8" else "bnb4"}
    tuner: dict[str, Any] = {"type": "lora", "lora": {"dropout": 0}} if adapted else {"type": "full"}
    part = {"from": {"inline": answered("yes", "no") if method == "gkd" else prompts()}}
    plan = {"evalSteps": 2, "pureBf16": tuned == "pure"} if narrow else {}
    wanted = spec(
        method,
        model=model,
        tuner=tuner,
        dataset={"train": [part], "validation": [part] if narrow else [], "maxLength": 48},
        training=training(
            maxSteps=STEPS,
            perDeviceBatchSize=rows,
            gradientAccumulationSteps=2,
            learningRate=5e-3 if adapted else 1e-3,
            **plan,
        ),
        distributed={"processesPerNode": world, **({} if way == "one" else {"strategy": way})},
        checkpoint={"saveSteps": 2},
        **{method: KNOBS[method]},
    )
    beside = models.beside[method]
    further = [ModelInput(field=FURTHER[method], reference="fineTuneJob/other", path=str(beside))]
    return run_config(wanted, root / (name or run), name=name or run, model=models.base, further=further)


@pytest.fixture(scope="module")
def matrix(base: Path, judge: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("rollouts")
    models = Models(base, {"grpo": judge, "ppo": judge, "gkd": teacher})
    alone = [Cell(cell(root, models, f"ppo-full-{way}")) for way in ("one", "deviceMap")]
    against = sorted({_under_ddp(run) for run in CELLS})
    together = [Cell(cell(root, models, run)) for run in (*against, *CELLS, *NARROW)]
    for run in RESUMED:
        config = cell(root, models, run, f"again-{run}")
        together += [Cell(config, stop_after=1, key=f"stopped-{run}"), Cell(config)]
    return Matrix(root, run_all(alone[0], alone[1:], together, root / "work", 560))


pytestmark = pytest.mark.timeout(600)


def _under_ddp(run: str) -> str:
    return run.rsplit("-", 1)[0] + "-ddp"


@pytest.mark.parametrize("run", CELLS)
@proves("grpo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2")
@proves("ppo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2")
@proves("gkd", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2")
def test_answers_learning_and_artifact_are_those_of_ddp(matrix: Matrix, run: str) -> None:
    same = _under_ddp(run)
    assert matrix.told(run) == pytest.approx(matrix.told(same), abs=1e-3)
    wanted, found = matrix.weights(same), matrix.weights(run)
    assert found.keys() == wanted.keys()
    assert not [name for name in found if "value_head" in name or ".ref." in name]
    for key, tensor in wanted.items():
        # Beside quantised weights TRL keeps what is trained in bfloat16.
        near = 2e-3 if tensor.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(found[key], tensor, atol=near, rtol=0)
    config = json.loads((matrix.root / run / "artifact/args.json").read_text())
    assert config["resolved"]["strategy"] == run.rsplit("-", 1)[1]


@pytest.mark.parametrize("run", NARROW)
def test_narrow_numbers_go_the_whole_way(matrix: Matrix, run: str) -> None:
    """Other answers are drawn than in float32, so that nothing can be held against it but that it comes to its end."""
    assert all(map(math.isfinite, matrix.told(run)))
    assert {tensor.dtype for tensor in matrix.weights(run).values()} == {torch.bfloat16}
    entries = json.loads((matrix.root / run / "report/history.json").read_text())
    name = "eval_divergence" if run.startswith("gkd") else "eval_reward"
    assert len([entry for entry in entries if name in entry]) == 2


def test_a_device_map_changes_nothing(matrix: Matrix) -> None:
    assert matrix.told("ppo-full-deviceMap") == matrix.told("ppo-full-one")


@pytest.mark.parametrize("method", METHODS)
def test_quantising_has_an_effect(matrix: Matrix, method: str) -> None:
    assert matrix.told(f"{method}-qlora-ddp") != matrix.told(f"{method}-lora-ddp")


@pytest.mark.parametrize("run", RESUMED)
@proves("grpo", "resume")
@proves("ppo", "resume")
@proves("gkd", "resume")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, run: str) -> None:
    stopped = matrix.endings[f"stopped-{run}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 1), (stopped, log(matrix.root / "work"))
    assert matrix.told(f"again-{run}") == matrix.told(run)
    assert matrix.endings[f"again-{run}"].from_step == 1
    calm, resumed = matrix.weights(run), matrix.weights(f"again-{run}")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in calm.items())
