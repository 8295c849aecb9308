"""Answers drawn by an engine beside the trainer: it follows the adapter, and what goes wrong there ends the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.unit.trainer.conftest import StartRanks, training
from tests.unit.trainer.rollout.beside_engine import BesideEngine, serving
from tests.unit.trainer.rollout.conftest import answered, job, logged, prompts, run
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit
from trimtab_trainer.endings import Fault
from trimtab_trainer.rollout import beside, handing, wire

pytestmark = pytest.mark.timeout(120)

GRPO: dict[str, Any] = {"rewards": [{"name": "accuracy"}], "numGenerations": 4, "maxCompletionLength": 4, "beta": 0.01}
PPO = {"rewardModel": {"from": {"fineTuneJob": {"name": "taste"}}}, "epochs": 2, "responseLength": 4}
GKD = {"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "lmbda": 1, "maxCompletionLength": 4}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BesideEngine]:
    root = tmp_path / "rollout"
    root.mkdir()
    with serving(BesideEngine(root)) as served:
        monkeypatch.setenv("TRIMTAB_ROLLOUT", str(root))
        monkeypatch.setenv("TRIMTAB_ENGINE_PORT", str(served.port))
        yield served


def grpo(base: Path, output: Path, steps: int = 3, rows: int = 8, **fields: Any) -> Any:
    plan = training(maxSteps=steps, perDeviceBatchSize=rows, gradientAccumulationSteps=1, learningRate=5e-3)
    data = {"train": [{"from": {"inline": prompts()}}], "maxLength": 48}
    lora = {"type": "lora", "lora": {"rank": 12, "dropout": 0}}
    wanted = {"dataset": data, "training": plan, "tuner": lora, "grpo": GRPO, "rollout": {"engine": "vllm"}}
    return job("grpo", base, output, **{**wanted, **fields})


def test_the_reward_rises_by_answers_of_an_engine_that_has_each_step_s_adapter(
    base: Path, tmp_path: Path, engine: BesideEngine
) -> None:
    run(grpo(base, tmp_path / "out", steps=12, rows=24))
    rewards = logged(tmp_path / "out", "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5
    assert list(engine.adapters) == [f"step-{step}" for step in range(12)]
    assert [asked["model"] for asked in engine.asked] == [f"step-{step}" for step in range(12) for _ in range(24)]
    assert len({asked["seed"] for asked in engine.asked}) == 12 * 24
    told = engine.told
    assert (told["path"], told["dtype"], told["maxModelLen"], told["maxLoraRank"]) == (str(base), "float32", 52, 12)
    # The two ways of counting are one model's.
    assert max(logged(tmp_path / "out", "sampling/sampling_logp_difference/max")) < 1e-3


def questions(*asked: dict[str, Any]) -> list[tuple[str, int, list[int]]]:
    """What was asked, in an order that does not depend on who was quicker."""
    return sorted((each["model"], each["seed"], each["prompt"]) for each in asked)


def test_a_run_that_goes_on_asks_and_learns_the_same(
    base: Path, tmp_path: Path, engine: BesideEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(grpo(base, tmp_path / "calm"))
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setenv("TRIMTAB_ROLLOUT", str(again))
    with serving(BesideEngine(again)) as other:
        monkeypatch.setenv("TRIMTAB_ENGINE_PORT", str(other.port))
        with pytest.raises(Fault, match="told to leave"):
            run(grpo(base, tmp_path / "disturbed"), leave_at=1)
        # Another attempt is another pod, with an engine that knows nothing.
        with serving(BesideEngine(again)) as third:
            monkeypatch.setenv("TRIMTAB_ENGINE_PORT", str(third.port))
            run(grpo(base, tmp_path / "disturbed"))
    assert questions(*other.asked, *third.asked) == questions(*engine.asked)
    one, two = ((tmp_path / name / "artifact/adapter_model.safetensors").read_bytes() for name in ("calm", "disturbed"))
    assert one == two


def test_an_engine_with_other_weights_is_noticed(base: Path, tmp_path: Path, engine: BesideEngine) -> None:
    engine.deaf = True
    with pytest.raises(Fault, match="it draws from other weights") as raised:
        run(grpo(base, tmp_path / "out", steps=5))
    assert raised.value.reason is Reason.ASSERTION_FAILED
    # Before the first step an adapter changes nothing.
    assert raised.value.step in (1, 3)


def test_an_engine_that_ends_ends_the_attempt(base: Path, tmp_path: Path, engine: BesideEngine) -> None:
    engine.fails_after = 10
    with pytest.raises(Fault, match=r"answered /v1/completions with 500: EngineCore") as raised:
        run(grpo(base, tmp_path / "out"))
    assert (raised.value.reason, raised.value.exit) == (Reason.ENGINE_FAILED, Exit.CRASHED)


def test_an_engine_that_never_comes(tmp_path: Path) -> None:
    nobody = wire.Wire(tmp_path, port=9)
    with pytest.raises(Fault, match=r"not ready within 0 s"):
        nobody.await_ready(0.1)
    with pytest.raises(Fault, match="does not answer: ConnectionRefusedError"):
        nobody.ask({})
    (tmp_path / "ended.json").write_text(json.dumps({"exitCode": 137}))
    with pytest.raises(Fault, match="ended with code 137 before it was ready"):
        nobody.await_ready(60)
    with pytest.raises(Fault, match="the engine ended with code 137"):
        nobody.unload("step-1")


def test_without_a_container_beside_the_trainer_there_is_no_engine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_ROLLOUT", str(tmp_path / "none"))
    with pytest.raises(Fault, match=r"Set rollout\.engine: transformers|none is here") as raised:
        run(grpo(base, tmp_path / "out"))
    assert raised.value.reason is Reason.SPEC_INVALID


@pytest.mark.parametrize("method", ["ppo", "gkd"])
def test_the_other_methods_that_speak(
    method: str, base: Path, judge: Path, teacher: Path, tmp_path: Path, engine: BesideEngine
) -> None:
    knobs, beside_it = {
        "ppo": (PPO, {"ppo.rewardModel.from": judge}),
        "gkd": (GKD, {"gkd.teacher.from": teacher}),
    }[method]
    rows = prompts() if method == "ppo" else answered("yes")
    data = {"train": [{"from": {"inline": rows}}], "maxLength": 48}
    plan = training(maxSteps=4, perDeviceBatchSize=4, gradientAccumulationSteps=1, learningRate=1e-2)
    wanted = {"dataset": data, "training": plan, method: knobs, "rollout": {"engine": "vllm"}}
    run(job(method, base, tmp_path / "out", beside_it, **wanted))
    # A round of ppo is learnt from twice. Neither the value head nor the reference enters an adapter.
    assert list(engine.adapters) == (["step-0", "step-2"] if method == "ppo" else [f"step-{n}" for n in range(4)])
    assert all("lora_" in name and "ref" not in name for names in engine.adapters.values() for name in names)


def test_all_weights_are_read_anew_and_the_value_head_is_not_among_them(
    base: Path, judge: Path, tmp_path: Path, engine: BesideEngine
) -> None:
    data = {"train": [{"from": {"inline": prompts()}}], "maxLength": 48}
    plan = training(maxSteps=6, perDeviceBatchSize=4, gradientAccumulationSteps=1, learningRate=2e-3)
    wanted = {"dataset": data, "training": plan, "ppo": PPO, "tuner": {"type": "full"}, "rollout": {"engine": "vllm"}}
    # That it draws from the weights of each round is held against the trainer's in rounds 1 and 2.
    run(job("ppo", base, tmp_path / "out", {"ppo.rewardModel.from": judge}, **wanted))
    assert engine.told["maxLoraRank"] == 0
    assert {asked["model"] for asked in engine.asked} == {"base"}
    artifact = load_file(tmp_path / "out/artifact/model.safetensors")
    assert engine.reloaded == [sorted(artifact)] * 3
    assert not list(engine.root.glob("step-*"))


@pytest.mark.timeout(240)
def test_all_ranks_of_a_pod_ask_one_engine_and_gather_for_it_what_is_split(
    base: Path, tmp_path: Path, engine: BesideEngine, start_ranks: StartRanks
) -> None:
    config = grpo(base, tmp_path / "out", steps=2, distributed={"processesPerNode": 2, "strategy": "fsdp2"})
    ranks = start_ranks(config, TRIMTAB_ROLLOUT=str(engine.root), TRIMTAB_ENGINE_PORT=str(engine.port))
    assert ranks.end(140).exit is Exit.OK, ranks.log
    assert list(engine.adapters) == ["step-0", "step-1"]
    assert len({asked["seed"] for asked in engine.asked}) == len(engine.asked) == 2 * 16


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["mlp.a"]}]
)
def test_an_adapter_that_goes_on_and_is_more_than_factors_is_refused(more: dict[str, Any]) -> None:
    handing.see_plain(LoraConfig(r=8, use_rslora=True))
    with pytest.raises(Fault, match=r"tuner\.continueFrom: the adapter has more") as raised:
        handing.see_plain(LoraConfig(r=8, **more))
    assert raised.value.reason is Reason.SPEC_INVALID


def test_top_p_explains_likelier_tokens_and_no_others() -> None:
    own, kept = torch.tensor([-1.0, -2.0]), 0.9
    assert beside.beyond(own, own - math.log(kept), 0.8) == 0
    assert beside.beyond(own, own - math.log(kept), 1.0) == pytest.approx(-2 * math.log(kept))
    assert beside.beyond(own, own - 0.5, 0.8) == pytest.approx(1.0)
