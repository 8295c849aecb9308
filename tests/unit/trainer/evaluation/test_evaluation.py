"""Evaluation by generation: what is learnt shows in held-out rows, however many processes answer them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation, lines, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, Manifest, ProgressReport, RunConfig
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.endings import Fault
from trimtab_trainer.notice import Notice
from trimtab_trainer.progress import Silent

pytestmark = pytest.mark.timeout(1200)

ANSWERS = {"north": "cold", "south": "warm", "east": "dawn", "west": "dusk"}
PHRASES = (
    "what is {}", "tell me of {}", "and {}", "say {}", "now please {}", "next is {}", "how far is {}", "name {}",
    "what comes from {}", "I ask for {}", "do you know {}", "think of {}",
)  # fmt: skip
ROWS = [(phrase.format(way), ANSWERS[way]) for phrase in PHRASES for way in ANSWERS]
HELD = ROWS[::5]
SEEN = [row for row in ROWS if row not in HELD]
SCRATCH = {
    "modelType": "llama", "hiddenSize": 48, "layers": 2, "attentionHeads": 2, "maxLength": 64,
    "tokenizer": {"train": {"vocabSize": 320}},
}  # fmt: skip
EVALUATION = {
    "generate": {"maxNewTokens": 8, "batchSize": 3},
    "metrics": ["exactMatch", "accuracy", "bleu", "rouge", "repetition"],
}
BASE = {"from": {"fineTuneJob": {"name": "base"}}}


def data(held: list[tuple[str, str]] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "train": [{"from": {"inline": lines([conversation(*row) for row in SEEN])}}],
        "validation": [{"from": {"inline": lines([conversation(*row) for row in held or HELD])}}],
        "maxLength": 48,
        **fields,
    }


def job(root: Path, name: str, base: str = "base", **fields: Any) -> RunConfig:
    """A short run of sft on the artifact of another."""
    plan = training(**{"maxSteps": 1, "perDeviceBatchSize": 8, "learningRate": 1e-7, **fields.pop("plan", {})})
    whole = {"tuner": {"type": "full"}, "training": plan, "evaluation": EVALUATION, "dataset": data(), **fields}
    wanted = spec("sft", model=BASE, checkpoint={"saveSteps": 100}, **whole)
    return run_config(wanted, root / name, name=name, model=root / base / "artifact")


def spread(strategy: str) -> dict[str, Any]:
    return {"distributed": {"nodes": 2, "strategy": strategy}}


class Runs:
    """What the runs of this file left."""

    def __init__(self, root: Path, endings: dict[str, Ending]):
        self.root = root
        self._endings = endings

    def ending(self, name: str) -> Ending:
        found = self._endings[name]
        assert found.reason is Reason.SUCCEEDED, (found, log(self.root / "work"))
        return found

    def predictions(self, name: str, step: int) -> list[dict[str, Any]]:
        self.ending(name)
        path = self.root / name / f"predictions/{step:09d}/predictions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def history(self, name: str) -> list[dict[str, Any]]:
        self.ending(name)
        found: list[dict[str, Any]] = json.loads((self.root / name / "report/history.json").read_text())
        return found

    def completions(self, name: str, step: int = 1) -> list[str]:
        return [each["completion"] for each in self.predictions(name, step)]


STEPS = 80


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("evaluation")
    unsure = lines([conversation(asked, "hm") for asked, _ in SEEN] + [conversation("say", each) for _, each in SEEN])
    base = run_config(
        spec(
            "pretrain", unsure, model={"scratch": SCRATCH}, dataset={**data(), "train": [{"from": {"inline": unsure}}]},
            training=training(maxSteps=15, perDeviceBatchSize=24, learningRate=1e-2, loggingSteps=20),
        ),
        root / "base", name="base",
    )  # fmt: skip
    twice = {**EVALUATION, "atStart": True}
    learnt = job(
        root, "learnt", training=training(maxSteps=STEPS, perDeviceBatchSize=19, learningRate=1e-2, loggingSteps=20),
        evaluation=twice,
    )  # fmt: skip
    some = {"generate": {"maxNewTokens": 8, "temperature": 1, "topP": 0.9}, "metrics": [], "rows": 4}
    alone = [
        Cell(learnt),
        # The second process has the base alone: the rest of the first one's share begins with what that one learnt.
        Cell(job(root, "drawn", plan={"loggingSteps": 1}, evaluation=some)),
        Cell(job(root, "alone", "learnt")),
    ]
    moves = {"learningRate": 1e-5, "scheduler": {"warmup": 0}}
    small = {"lora": {"rank": 4, "dropout": 0, "initWeights": "pissa"}}
    together = [
        Cell(job(root, "ddp", "learnt", **spread("ddp"))),
        Cell(job(root, "asked", "learnt", **spread("ddp"), training={"maxSteps": 0})),
        Cell(job(root, "zero3", "learnt", **spread("zero3"), evaluation=twice)),
        Cell(job(root, "fsdp2", "learnt", **spread("fsdp2"), evaluation=twice)),
        Cell(job(root, "pissa", "learnt", **spread("ddp"), tuner=small, plan=moves)),
        Cell(job(root, "zero3-lora", "learnt", **spread("zero3"), tuner={}, plan=moves)),
        Cell(job(root, "fsdp2-lora", "learnt", **spread("fsdp2"), tuner={}, plan=moves)),
    ]
    return Runs(root, run_all(Cell(base), alone, together, root / "work", 1100))


@proves("sft", "full")
def test_exact_match_rises_on_rows_that_were_held_out(runs: Runs) -> None:
    figures = [each for each in runs.history("learnt") if "eval_exactMatch" in each]
    assert [each["step"] for each in figures] == [0, STEPS]
    before, after = (each["eval_exactMatch"] for each in figures)
    assert (before, after >= 0.9) == (0, True), figures
    assert [each["eval_rouge1"] for each in figures] == [before, after]
    assert figures[1]["eval_accuracy"] == after

    lines = runs.predictions("learnt", STEPS)
    assert [each["row"] for each in lines] == list(range(1, len(HELD) + 1))
    assert [(each["messages"][0]["content"], each["reference"]) for each in lines] == HELD
    said = [float(each["completion"] == wanted) for each, (_, wanted) in zip(lines, HELD, strict=True)]
    assert sum(said) / len(said) == pytest.approx(after, abs=1e-6)
    assert [each["scores"]["exactMatch"] for each in lines] == said
    assert {each["finishReason"] for each in lines} == {"stop"}
    assert not set(runs.completions("learnt", 0)) & set(ANSWERS.values())


def test_answers_have_a_manifest_and_everybody_names_their_place(runs: Runs) -> None:
    ending, folder = runs.ending("learnt"), runs.root / f"learnt/predictions/{STEPS:09d}"
    assert ending.predictions is not None
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert (ending.predictions.uri, ending.predictions.digest) == (str(folder), manifest.digest)
    assert ending.predictions.rows == len(HELD)
    assert [file.path for file in manifest.files] == ["metrics.json", "predictions.jsonl"]
    assert manifest.files[1].sha256 == hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    assert manifest.made_by["step"] == STEPS
    arguments = json.loads((runs.root / "learnt/artifact/args.json").read_text())
    assert arguments["predictions"] == f"predictions/{STEPS:09d}"
    summary = json.loads((folder / "metrics.json").read_text())
    assert summary["metrics"]["answersEnded"] == 1
    assert "eval_exactMatch" in (runs.root / "learnt/report/index.html").read_text()
    assert len(list((runs.root / "learnt/report").glob("events*"))) == 1


@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2", "pissa", "zero3-lora", "fsdp2-lora"])
@proves("sft", "ddp", "zero3", "fsdp2")
def test_two_processes_answer_as_one(runs: Runs, name: str) -> None:
    alone = runs.predictions("alone", 1)
    assert [each["completion"] for each in alone] == runs.completions("learnt", STEPS)
    assert runs.predictions(name, 1) == alone
    if name in ("zero3", "fsdp2"):
        assert runs.predictions(name, 0) == alone


def test_two_processes_answer_as_one_without_a_training(runs: Runs) -> None:
    assert runs.predictions("asked", 0) == runs.predictions("alone", 1)
    artifact = runs.ending("asked").artifact
    assert artifact is not None
    assert artifact.kind == "predictions"


def test_some_rows_drawn_and_not_scored(runs: Runs) -> None:
    found = runs.predictions("drawn", 1)
    assert len(found) == 4
    assert [each["row"] for each in found] == sorted({each["row"] for each in found})
    assert {json.dumps(each["scores"]) for each in found} == {"{}"}


# ------------------------------------------------------------ in this process


class Leaves:
    """Gives notice at the first report after the artifact was sealed: the first rows are answered then."""

    def __init__(self, output: Path, notice: Notice):
        self._sealed = output / "artifact/manifest.json"
        self._notice = notice
        self.reports: list[ProgressReport] = []

    def report(self, report: ProgressReport) -> None:
        self.reports.append(report)
        self._notice.given = self._notice.given or self._sealed.is_file()

    def close(self) -> None:
        """Nothing is kept open."""


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_here(config: RunConfig, notice: Notice | None = None, reporter: Any = None) -> Ending:
    from trimtab_trainer.run import Run

    assert config.output.path is not None
    group, output = Group(Place(0, 0, 1, 1), 1, 60), Path(config.output.path)
    work = output.with_name(output.name + "-work")
    return Run(config, group, work, notice or Notice(), reporter or Silent())()


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_other_methods_models_are_asked_alike(runs: Runs, method: str) -> None:
    if method == "dpo":
        block: dict[str, Any] = {}
        rows = [{**conversation(asked, right), "rejected_response": "hm"} for asked, right in HELD]
    else:
        block = {"grpo": {"rewards": [{"name": "accuracy"}], "numGenerations": 4, "maxCompletionLength": 4}}
        rows = [{**conversation(asked, right), "solution": right} for asked, right in HELD]
    inline = [{"from": {"inline": lines(rows)}}]
    wanted = spec(
        method, model=BASE, tuner={"type": "full"}, dataset={"train": inline, "validation": inline, "maxLength": 48},
        training=training(maxSteps=1, learningRate=1e-7), evaluation={**EVALUATION, "atStart": True}, **block,
    )  # fmt: skip
    runs.ending("alone")
    ending = run_here(run_config(wanted, runs.root / method, name=method, model=runs.root / "learnt/artifact"))
    assert ending.predictions is not None
    for step in (0, 1):
        found = [json.loads(line) for line in _lines(runs.root / method, step)]
        assert [each["completion"] for each in found] == runs.completions("alone"), step
        assert [each["reference"] for each in found] == [right for _, right in HELD]
    entries = json.loads((runs.root / method / "report/history.json").read_text())
    assert [each["eval_exactMatch"] for each in entries if "eval_exactMatch" in each] == [1.0, 1.0]


@proves("sft", "resume")
def test_told_to_leave_while_answering_it_goes_on_without_training(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.ending("learnt")
    config, notice = job(runs.root, "left", "learnt"), Notice()
    reporter = Leaves(runs.root / "left", notice)
    with pytest.raises(Fault) as left:
        run_here(config, notice, reporter)
    assert (left.value.reason, left.value.step) == (Reason.PREEMPTED, 1), left.value
    assert "after 3 of 10 rows were answered" in left.value.message
    assert not (runs.root / "left/predictions").exists()

    from transformers import Trainer

    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr(Trainer, "training_step", trained)
    again = Leaves(Path("nowhere"), Notice())
    ending = run_here(config, reporter=again)
    assert (ending.reason, ending.from_step, ending.step) == (Reason.SUCCEEDED, 1, 1)
    assert [json.loads(line)["completion"] for line in _lines(runs.root / "left", 1)] == runs.completions("alone")
    last = again.reports[-1].progress
    assert last is not None
    assert last.metrics["eval_exactMatch"] >= 0.9


def _lines(output: Path, step: int) -> list[str]:
    return (output / f"predictions/{step:09d}/predictions.jsonl").read_text().splitlines()


def test_answers_that_fail_leave_the_artifact(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab_trainer.rollout.engine import OwnModel

    def fails(*_: Any) -> None:
        raise MemoryError("no room for the answers")

    runs.ending("learnt")
    monkeypatch.setattr(OwnModel, "generate", fails)
    with pytest.raises(Fault) as failed:
        run_here(job(runs.root, "failed", "learnt"))
    sealed = runs.root / "failed/artifact"
    assert failed.value.reason is Reason.OUT_OF_MEMORY
    assert f"the model was published as {sealed}" in failed.value.message
    assert Manifest.model_validate_json((sealed / "manifest.json").read_bytes()).files
    assert (runs.root / "failed/report/index.html").is_file()


NOBODY_ASKS = {"text": "the harbour is calm"}


@pytest.mark.parametrize(
    ("method", "held", "evaluation", "part"),
    [
        ("pretrain", [NOBODY_ASKS], {}, "validation row 1: plain text asks nothing"),
        ("sft", [conversation(*ROWS[0])], {"generate": {"maxNewTokens": 64}}, "more than the 64 that the model"),
    ],
)
def test_rows_that_cannot_be_asked(
    runs: Runs, tmp_path: Path, method: str, held: list[dict[str, Any]], evaluation: dict[str, Any], part: str
) -> None:
    runs.ending("learnt")
    asked = data(validation=[{"from": {"inline": lines(held)}}])
    wanted = spec(
        method, model=BASE, tuner={"type": "full"}, training=training(maxSteps=1), dataset=asked, evaluation=evaluation
    )
    with pytest.raises(Fault, match=part):
        run_here(run_config(wanted, tmp_path / "out", model=runs.root / "learnt/artifact"))
