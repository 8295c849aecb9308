"""Rows that show images, spread over two processes: losses, gradients and artifacts as of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import lines, run_config, spec, training
from tests.unit.trainer.images.conftest import COLOURS, others, shown
from tests.unit.trainer.strategies.cells import Cell, run_all
from tests.unit.trainer.strategies.test_matrix import Matrix
from tests.unit.trainer.strategies.test_preferences import course, see_same
from trimtab_api.contract import RunConfig
from trimtab_trainer import preflight
from trimtab_trainer.data.media import see_alike
from trimtab_trainer.endings import Fault

STEPS = 3
TUNERS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "lora": {"dropout": 0}}}
SHADES = (-28, -20, -12, -4, 4, 12, 20, 28)
TOLD = [shown(colour, shade, f"It is {colour}.") for shade in SHADES for colour in COLOURS]
TEXT = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello!"}]}] * 6
ROWS = {
    "sft": TOLD,
    # A pass may show no image at all, in one process or in both.
    "sft mixed": [*TOLD[:9], *TEXT, *TOLD[9:]],
    "dpo": [
        {**shown(colour, shade, colour), "rejected_response": others(colour)[0]}
        for shade in SHADES
        for colour in COLOURS
    ],
}
NAMES = [
    *(f"sft-{tuned}-{strategy}" for tuned in TUNERS for strategy in ("ddp", "zero2", "zero3", "fsdp2")),
    *("sft mixed-full-ddp", "sft mixed-full-zero2"),
    *("dpo-lora-zero3", "dpo-full-zero3", "dpo-full-fsdp2"),
]


def cell(root: Path, seeing: Path, method: str, tuned: str, strategy: str = "one") -> RunConfig:
    """The same rows in the same order, whatever the number of processes."""
    world = 1 if strategy == "one" else 2
    plan = training(
        maxSteps=STEPS,
        perDeviceBatchSize=4 // world,
        gradientAccumulationSteps=2,
        learningRate=5e-3,
        scheduler={"type": "constant", "warmup": 0},
    )
    rows = {"train": [{"from": {"inline": lines(ROWS[method])}}], "maxLength": 64, "shuffle": False}
    spread = {"processesPerNode": world, "strategy": "auto" if strategy == "one" else strategy}
    wanted = spec(
        method.split()[0],
        dataset=rows,
        training=plan,
        tuner=TUNERS[tuned],
        distributed=spread,
        checkpoint={"saveSteps": 100},
    )
    name = f"{method}-{tuned}-{strategy}".replace(" ", "_")
    return run_config(wanted, root / name, name=name, model=seeing)


@pytest.fixture(scope="module")
def matrix(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("split")
    names = [name.split("-") for name in NAMES]
    first, *alone = [
        Cell(cell(root, seeing, *each)) for each in sorted({(method, tuned) for method, tuned, _ in names})
    ]
    together = [Cell(cell(root, seeing, *each)) for each in names]
    return Matrix(root, run_all(first, alone, together, root / "work", 600))


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", NAMES)
@proves("sft", "images", "ddp", "zero2", "zero3", "fsdp2")
@proves("dpo", "images", "zero3", "fsdp2")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, name: str) -> None:
    method, tuned, strategy = name.replace(" ", "_").split("-")
    losses = [entry["loss"] for entry in course(matrix, f"{method}-{tuned}-one")]
    assert len(set(losses)) == STEPS
    see_same(matrix, f"{method}-{tuned}-{strategy}", f"{method}-{tuned}-one")
    args = json.loads((matrix.root / f"{method}-{tuned}-{strategy}" / "artifact/args.json").read_text())
    assert args["resolved"]["strategy"] == strategy


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_rows_without_images_are_not_mixed_in_where_weights_are_split(strategy: str) -> None:
    """A process whose pass shows none would leave the others waiting for the weights that see."""
    rows: Any = ROWS["sft mixed"]
    with pytest.raises(Fault, match=f"6 rows show no images and others do, which {strategy} cannot mix"):
        see_alike(rows, {"image"}, strategy)
    see_alike(ROWS["sft"], {"image"}, strategy)


def test_the_preflight_sees_it(seeing: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="6 rows show no image"):
        preflight.check(cell(tmp_path, seeing, "sft mixed", "full", "zero3"), tmp_path / "look")
