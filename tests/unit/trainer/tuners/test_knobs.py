"""The optimisation's knobs: each is seen to do what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import chats, history, lines, run_config, spec
from tests.unit.trainer.tuners.conftest import adapter_input, document, made, tune
from trimtab_api.conditions import Reason
from trimtab_trainer import preflight, stopping
from trimtab_trainer.endings import Fault

pytestmark = pytest.mark.timeout(120)

RATES = {"adamw": 2e-3, "adamw8bit": 2e-3, "adafactor": 1e-2, "lion": 5e-4, "sgd": 0.5}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tensors are large enough for a state of 8 bit."""
    return made(tmp_path_factory.mktemp("wide") / "base", hiddenSize=64, intermediateSize=128)


@pytest.mark.parametrize("optimizer", RATES)
def test_every_optimizer_learns_and_goes_on(wide: Path, tmp_path: Path, optimizer: str) -> None:
    """The loss falls, and a resumed run ends as the undisturbed one."""
    plan = {"maxSteps": 6, "optimizer": optimizer, "learningRate": RATES[optimizer]}
    keep = {"saveSteps": 3, "keep": 2}
    whole = tune(wide, tmp_path / "out", {"type": "full"}, training=plan, checkpoint=keep)
    calm = history(tmp_path / "out")
    assert calm[-1][1] < calm[0][1] - 0.05, calm
    shutil.rmtree(tmp_path / "out/checkpoints/000000006")
    again = tune(wide, tmp_path / "out", {"type": "full"}, training=plan, checkpoint=keep)
    assert again.from_step == 3
    assert history(tmp_path / "out") == calm
    assert whole.artifact is not None
    assert again.artifact is not None
    assert again.artifact.digest == whole.artifact.digest


def test_the_8_bit_optimizer_keeps_8_bit(wide: Path, tmp_path: Path) -> None:
    import torch

    plan = {"maxSteps": 2, "optimizer": "adamw8bit"}
    tune(wide, tmp_path / "out", {"type": "full"}, training=plan, checkpoint={"saveSteps": 2})
    state = torch.load(tmp_path / "out/checkpoints/000000002/optimizer.pt", weights_only=False)["state"]
    kept = [each.get("__bnb_optimizer_quant_state__", each) for each in state.values()]
    assert torch.uint8 in {each["state1"].dtype for each in kept}


def test_noise_on_the_embeddings_is_for_training_alone(base: Path, tmp_path: Path) -> None:
    held = {"train": [{"from": {"inline": chats()}}], "validation": [{"from": {"inline": chats()}}], "maxLength": 128}
    tune(base, tmp_path / "calm", {}, training={"maxSteps": 2}, dataset=held)
    tune(base, tmp_path / "noisy", {}, training={"maxSteps": 2, "neftuneAlpha": 100}, dataset=held)
    assert history(tmp_path / "noisy")[0][1] > history(tmp_path / "calm")[0][1] * 1.05
    calm, noisy = (
        [entry["eval_loss"] for entry in document(tmp_path / name / "report/history.json") if "eval_loss" in entry]
        for name in ("calm", "noisy")
    )
    assert noisy[0] < history(tmp_path / "noisy")[0][1]
    assert noisy[0] == pytest.approx(calm[0], rel=0.2)


def test_a_run_ends_early_and_says_where(base: Path, tmp_path: Path) -> None:
    """Validation rows that contradict the training make the loss rise: the run ends, and stays ended."""
    held = {
        "train": [{"from": {"inline": chats("I am Swift.")}}],
        "validation": [{"from": {"inline": chats("No such thing at all!")}}],
        "maxLength": 128,
    }
    plan = {
        "maxSteps": 40, "evalSteps": 2, "learningRate": 2e-2, "evaluateAtStart": True,
        "earlyStopping": {"patience": 2},
    }  # fmt: skip
    ending = tune(base, tmp_path / "out", {}, training=plan, dataset=held)
    assert ending.step is not None
    assert ending.step < 40
    entries = document(tmp_path / "out/report/history.json")
    assert entries[0]["step"] == 0
    assert "eval_loss" in entries[0]
    assert stopping.stale(entries, 0) == 2
    again = tune(base, tmp_path / "out", {}, training=plan, dataset=held)
    assert (again.from_step, again.step) == (ending.step, ending.step)


@pytest.mark.parametrize(
    ("losses", "threshold", "stale"),
    [([], 0, 0), ([3, 2, 1], 0, 0), ([1, 2, 3], 0, 2), ([3, 2, 2.5, 1.9], 0, 0), ([3, 2.95, 2.9], 0.2, 2)],
)
def test_how_long_a_loss_is_stale(losses: list[float], threshold: float, stale: int) -> None:
    assert stopping.stale([{"eval_loss": loss} for loss in losses] + [{"loss": 1.0}], threshold) == stale


def test_rows_of_like_length_share_a_batch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab_trainer.methods import causal

    padding: dict[str, int] = {}
    name, whole = "", causal.Collator.__call__

    def count(collator: Any, rows: Any) -> Any:
        batch = whole(collator, rows)
        padding[name] = padding.get(name, 0) + int((batch["attention_mask"] == 0).sum())
        return batch

    monkeypatch.setattr(causal.Collator, "__call__", count)
    rows = lines([{"query": "q" * (1 + i % 8) * 8, "response": "a" * 9} for i in range(1, 65)])
    for name, plan in (("mixed", {}), ("alike", {"groupByLength": True})):
        tune(base, tmp_path / name, {}, inline=rows, training={"maxSteps": 8, "dataloaderWorkers": 0, **plan})
    assert padding["alike"] < padding["mixed"] / 2


# ------------------------------------------------------------ what the preflight finds of all this


def _look(base: Path, work: Path, **fields: Any) -> Any:
    further = fields.pop("further", [])
    work.mkdir()
    return preflight.check(run_config(spec("sft", **fields), work / "out", model=base, further=further), work)


def test_the_preflight_tells_the_memory(base: Path, tmp_path: Path) -> None:
    found = _look(base, tmp_path / "a", pod={"resources": {"limits": {"memory": "4Gi"}}}).memory
    assert found.parameters == pytest.approx(40_000, rel=0.3)
    assert found.available_bytes == 4 * 2**30
    with pytest.raises(Fault) as short:
        _look(base, tmp_path / "b", pod={"resources": {"limits": {"memory": "256Mi"}}})
    assert short.value.reason is Reason.MEMORY_TOO_SMALL
    assert "256.0 MiB are there" in short.value.message or "0.2 GiB are there" in short.value.message
    gpu = {"pod": {"resources": {"limits": {"nvidia.com/gpu": 1}}}, "distributed": {"deviceMemory": "80Gi"}}
    assert _look(base, tmp_path / "c", **gpu).memory.available_bytes == 80 * 2**30


def test_the_preflight_sees_adapters_and_tokens(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "first", {"lora": {"rank": 2}}, training={"maxSteps": 2})
    lower, source = tmp_path / "first/artifact", {"fineTuneJob": {"name": "first"}}
    sound = _look(
        base, tmp_path / "a", tuner={"continueFrom": source}, further=[adapter_input("tuner.continueFrom", lower)]
    )
    assert [pin.field for pin in sound.pins[:2]] == ["model.from", "tuner.continueFrom"]
    args = document(lower / "args.json")
    args["base"]["digest"] = "sha256:" + "0" * 64
    (lower / "args.json").write_text(json.dumps(args))
    for number, (folder, reason) in enumerate(((lower, Reason.BASE_MISMATCH), (base, Reason.MODEL_INVALID))):
        with pytest.raises(Fault) as refused:
            _look(
                base,
                tmp_path / f"b{number}",
                tuner={"continueFrom": source},
                further=[adapter_input("tuner.continueFrom", folder)],
            )
        assert refused.value.reason is reason
    with pytest.raises(Fault, match=r"do not fit the 300 rows"):
        _look(base, tmp_path / "d", model={"from": {"fineTuneJob": {"name": "base"}}, "newTokens": ["<|tool|>"]})
