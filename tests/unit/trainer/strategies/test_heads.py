"""Models that answer with numbers, spread and quantised: losses and gradients as of one process, whole heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from tests.matrix import proves
from tests.unit.trainer.conftest import SCRATCH, conversation, lines, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from tests.unit.trainer.strategies.test_matrix import TUNERS, Matrix
from tests.unit.trainer.strategies.test_preferences import QUESTIONS, course, see_same
from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scalar

STEPS = 3
PLACES = [question + " please" * (number // 4 % 3) for number, question in enumerate(QUESTIONS * 4)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "rewardModel": [{**conversation(place, "I am a test."), "rejected_response": "No, I am not."} for place in PLACES],
    "sequenceClassification": [{"query": place, "label": index % 4 // 2} for index, place in enumerate(PLACES)],
    "embedding": [
        {"anchor": place, "positive": f"answer {index}", "negatives": ["nobody knows"] * (index % 3)}
        for index, place in enumerate(PLACES)
    ],
    "reranker": [
        {"query": place, "positive": f"answer {index}", "negatives": ["nobody knows", "another time"]}
        for index, place in enumerate(PLACES)
    ],
}
KNOBS: dict[str, dict[str, Any]] = {"sequenceClassification": {"classification": {"numLabels": 2}}}
CELLS = [
    *("rewardModel-full-zero2", "rewardModel-lora-zero3", "rewardModel-full-fsdp2", "rewardModel-qlora-ddp"),
    *("rewardModel-qlora-zero3", "rewardModel-qlora-fsdp2", "rewardModel-pure-zero2"),
    *("sequenceClassification-lora-ddp", "sequenceClassification-qlora-zero2", "sequenceClassification-full-zero3"),
    "sequenceClassification-lora-fsdp2",
    *("embedding-qlora-ddp", "embedding-full-zero2", "embedding-full-zero3", "embedding-full-fsdp2"),
    *("embedding-lora-zero3", "embedding-qlora-fsdp2"),
    *(
        "reranker-full-ddp",
        "reranker-qlora8-zero1",
        "reranker-lora-zero2",
        "reranker-qlora-zero3",
        "reranker-full-fsdp2",
    ),
]
"""Each in two processes, of which each is a pod with a disk of its own."""
OFFLOADED = {"rewardModel-full-zero3": {"optimizer": True, "parameters": True}}
RESUMED = ("rewardModel-qlora-fsdp2", "embedding-full-zero3")
"""Interrupted after two steps, by a signal to the last process."""


def cell(root: Path, method: str, tuned: str, strategy: str = "", name: str = "", **distributed: Any) -> RunConfig:
    """A run on the same rows in the same order, whatever the number of processes."""
    world = 1 if strategy in ("", "deviceMap") else 2
    fields = {**TUNERS[tuned], **KNOBS.get(method, {})}
    plan = {
        "maxSteps": STEPS,
        "perDeviceBatchSize": 4 // world,
        "gradientAccumulationSteps": 2,
        "learningRate": 5e-3,
        "scheduler": {"type": "constant", "warmup": 0},
        **fields.pop("training", {}),
    }
    rows = {"train": [{"from": {"inline": lines(ROWS[method])}}], "maxLength": 128, "shuffle": False}
    spread = {"processesPerNode": world, **({"strategy": strategy} if strategy else {}), **distributed}
    wanted = spec(
        method, dataset=rows, training=training(**plan), distributed=spread, checkpoint={"saveSteps": 100}, **fields
    )
    name = name or f"{method}-{tuned}-{strategy or 'one'}"
    return run_config(wanted, root / name, name=name, model=root / "base/artifact")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("numbers")
    base = run_config(spec(model={"scratch": SCRATCH}), root / "base", name="base")
    names = [name.split("-") for name in CELLS]
    ways = sorted({(method, tuned) for method, tuned, _ in names} | {("embedding", "lora")})
    alone = [Cell(cell(root, *way)) for way in ways]
    alone += [Cell(cell(root, method, "lora", "deviceMap")) for method in ("rewardModel", "embedding")]
    together = [Cell(cell(root, *name)) for name in names]
    together += [
        Cell(cell(root, *name.split("-"), f"offloaded-{name}", offload=each)) for name, each in OFFLOADED.items()
    ]
    for name in RESUMED:
        config = cell(root, *name.split("-"), f"again-{name}")
        together += [Cell(config, stop_after=2, key=f"stopped-{name}"), Cell(config)]
    return Matrix(root, run_all(Cell(base), alone, together, root / "work", 1100))


pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("name", CELLS)
@proves("rewardModel", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("sequenceClassification", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("embedding", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("reranker", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, name: str) -> None:
    method, tuned, strategy = name.split("-")
    rounded = tuned not in ("full", "lora")
    see_same(matrix, name, f"{method}-{tuned}-one", near=1e-2 if tuned == "pure" else 2e-4, rounded=rounded)
    config = json.loads((matrix.root / name / "artifact/args.json").read_text())
    assert config["resolved"]["strategy"] == strategy


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("rewardModel-lora-deviceMap", "rewardModel-lora-one"),
        ("embedding-lora-deviceMap", "embedding-lora-one"),
        *((f"offloaded-{name}", "rewardModel-full-one") for name in OFFLOADED),
    ],
)
def test_what_goes_another_way_comes_to_the_same(matrix: Matrix, name: str, alone: str) -> None:
    see_same(matrix, name, alone)


@pytest.mark.parametrize("name", [each for each in CELLS if "-qlora-" in each and not each.startswith("embedding")])
def test_a_head_that_was_learnt_on_quantised_weights_reads_the_whole_ones(matrix: Matrix, name: str) -> None:
    """The adapter brings its head, and on the base as it was the scores order what they were taught to."""
    method, _, _ = name.split("-")
    course(matrix, name)
    base = LocalModel(matrix.root / "base/artifact", "fineTuneJob/base", None)
    published = LocalModel(matrix.root / name / "artifact", "fineTuneJob/head", None, base=base)
    judge = scalar.open_published(published, "ppo.rewardModel", torch.float32)
    if method == "rewardModel":
        good, bad = ([conversation(place, answer)["messages"] for place in PLACES] for answer in _ANSWERS)
        assert float((judge(good) - judge(bad)).mean()) > 0.1
        return
    head = next(weight for key, weight in judge.model.named_parameters() if "modules_to_save" in key)
    assert head.shape == (2 if method == "sequenceClassification" else 1, SCRATCH["hiddenSize"])
    assert torch.isfinite(judge([conversation("hello there", "I am a test.")["messages"]])).all()


_ANSWERS = ("I am a test.", "No, I am not.")


@pytest.mark.parametrize("method", sorted(ROWS))
def test_quantising_has_an_effect(matrix: Matrix, method: str) -> None:
    tuned = "qlora8" if method == "reranker" else "qlora"
    quantised, plain = course(matrix, f"{method}-{tuned}-one"), course(matrix, f"{method}-lora-one")
    assert [entry["loss"] for entry in quantised] != [entry["loss"] for entry in plain]
    assert quantised[0]["loss"] == pytest.approx(plain[0]["loss"], abs=0.1)
    assert quantised[-1]["loss"] < quantised[0]["loss"]


def test_vectors_learnt_on_quantised_weights_are_of_the_whole_ones(matrix: Matrix) -> None:
    course(matrix, "embedding-qlora-fsdp2")
    base: Any = AutoModel.from_pretrained(matrix.root / "base/artifact")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(input_ids=ids).last_hidden_state
        adapted: Any = PeftModel.from_pretrained(base, str(matrix.root / "embedding-qlora-fsdp2/artifact")).eval()
        assert not torch.allclose(adapted(input_ids=ids).last_hidden_state, before, atol=1e-3)


@pytest.mark.parametrize("name", RESUMED)
@proves("rewardModel", "resume")
@proves("embedding", "resume")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, name: str) -> None:
    stopped = matrix.endings[f"stopped-{name}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 2), (stopped, log(matrix.root / "work"))
    assert course(matrix, f"again-{name}") == course(matrix, name)
    assert matrix.endings[f"again-{name}"].from_step == 2
    resumed = matrix.weights(f"again-{name}")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in matrix.weights(name).items())
