"""A job that learns nothing: the model as it is answers rows, and the answers are what it makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation, lines, run_config, spec, training
from tests.unit.trainer.rollout.conftest import pretrained
from tests.unit.trainer.rollout.conftest import run as run_here
from trimtab_api.contract import Ending, Manifest, ModelInput, RunConfig
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import preflight

pytestmark = pytest.mark.timeout(400)

ASKED = ("is it calm", "is it late", "are you sure", "can we sail")
BASE = {"fineTuneJob": {"name": "base"}}


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says no to everything."""
    rows = lines([conversation(asked, "no") for asked in ASKED] + [conversation("say", "yes")])
    return pretrained(tmp_path_factory.mktemp("inference") / "base", rows, steps=60)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Says yes to everything, on that base."""
    rows = lines([conversation(asked, "yes") for asked in ASKED])
    wanted = spec(
        "sft", rows, model={"from": BASE}, tuner={"lora": {"rank": 8, "dropout": 0, "targetModules": ["all-linear"]}},
        training=training(maxSteps=60, learningRate=2e-2), checkpoint={"saveSteps": 100},
    )  # fmt: skip
    folder = base.parent.parent / "adapter"
    run_here(run_config(wanted, folder, name="adapter", model=base))
    return folder / "artifact"


def asking(rows: list[dict[str, Any]], **fields: Any) -> FineTuneJobSpec:
    """A job that answers these rows."""
    return FineTuneJobSpec.model_validate(
        {
            "method": "sft",
            "model": {"from": BASE},
            "dataset": {"validation": [{"from": {"inline": lines(rows)}}], "maxLength": 40},
            "training": {"maxSteps": 0},
            "evaluation": {"generate": {"maxNewTokens": 6}},
            **fields,
        }
    )


def config_of(wanted: FineTuneJobSpec, output: Path, base: Path, adapter: Path | None = None) -> RunConfig:
    further = []
    if adapter is not None:
        further = [ModelInput(field="tuner.continueFrom", reference="fineTuneJob/adapter", path=str(adapter))]
    config = run_config(wanted, output, model=base, further=further)
    return config.model_copy(update={"train": config.train if wanted.dataset.train else []})


def answers(output: Path, step: int = 0) -> list[dict[str, Any]]:
    path = output / f"predictions/{step:09d}/predictions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


WITH_ANSWERS = [conversation(asked, "yes") for asked in ASKED]
WITHOUT = [{"messages": [{"role": "user", "content": asked}]} for asked in ASKED]


@pytest.mark.parametrize(("adapted", "said", "right"), [(False, "no", 0.0), (True, "yes", 1.0)])
def test_the_base_or_the_adapter_answers(
    base: Path, adapter: Path, tmp_path: Path, adapted: bool, said: str, right: float
) -> None:
    tuner = {"continueFrom": {"fineTuneJob": {"name": "adapter"}}} if adapted else {}
    config = config_of(asking(WITH_ANSWERS, tuner=tuner), tmp_path / "out", base, adapter if adapted else None)
    checked = preflight.check(config, tmp_path / "preflight")
    assert (checked.rows, checked.memory) == (len(ASKED), None)
    ending = run_here(config)
    assert [each["completion"] for each in answers(tmp_path / "out")] == [said] * len(ASKED)
    assert {each["scores"]["exactMatch"] for each in answers(tmp_path / "out")} == {right}
    _made(ending, tmp_path / "out")
    history = json.loads((tmp_path / "out/report/history.json").read_text())
    assert [entry["eval_exactMatch"] for entry in history] == [right]


def _made(ending: Ending, output: Path) -> None:
    """The artifact is the answers, by their manifest, and nothing else was published."""
    folder = output / "predictions/000000000"
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert ending.artifact is not None
    assert ending.predictions is not None
    assert (ending.artifact.kind, ending.artifact.uri) == ("predictions", str(folder))
    assert ending.artifact.digest == ending.predictions.digest == manifest.digest
    assert ending.artifact.dataset_digest == ending.dataset_digest
    assert not (output / "artifact").exists()
    assert not (output / "checkpoints").exists()


def test_rows_without_answers_are_answered(base: Path, tmp_path: Path) -> None:
    wanted = asking(WITHOUT, evaluation={"generate": {"maxNewTokens": 6}, "metrics": []})
    ending = run_here(config_of(wanted, tmp_path / "out", base))
    assert ending.message.startswith(f"answered {len(ASKED)} rows")
    found = answers(tmp_path / "out")
    assert [(each["reference"], each["completion"], each["scores"]) for each in found] == [(None, "no", {})] * 4


def test_the_rows_that_a_training_set_aside_are_those_that_are_asked(base: Path, tmp_path: Path) -> None:
    """The same rows, split and seed give the same validation rows with and without a training."""
    rows = [conversation(f"{asked} {number}", "no") for number in range(5) for asked in ASKED]
    dataset = {"train": [{"from": {"inline": lines(rows)}}], "validationSplit": 0.2, "seed": 5, "maxLength": 40}
    fields: dict[str, Any] = {"dataset": dataset, "evaluation": {"generate": {"maxNewTokens": 4}}}
    trained = spec("sft", model={"from": BASE}, tuner={"type": "full"}, training=training(maxSteps=1), **fields)
    run_here(run_config(trained, tmp_path / "trained", model=base))
    run_here(config_of(asking([], **fields), tmp_path / "asked", base))
    asked, before = answers(tmp_path / "asked"), answers(tmp_path / "trained", 1)
    assert len(asked) == 4
    assert [(each["row"], each["messages"]) for each in asked] == [(each["row"], each["messages"]) for each in before]


@pytest.mark.parametrize(
    ("fields", "tuner", "strategy"),
    [
        ({}, "full", "none"),
        ({"tuner": {"continueFrom": BASE}}, "lora", "none"),
        ({"distributed": {"nodes": 2}}, "full", "ddp"),
    ],
)
def test_what_is_left_open(fields: dict[str, Any], tuner: str, strategy: str) -> None:
    found = resolve(asking(WITHOUT, **fields))
    assert (found.tuner_type, found.strategy) == (tuner, strategy)
