"""Whole runs of tiny models: what an artifact holds, what moves, what is refused, what can be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import proves
from tests.unit.trainer.conftest import SCRATCH, StartRanks, chats, history, lines, run_config, spec, training
from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, Manifest, RankResult

pytestmark = pytest.mark.timeout(240)


def _run(start_ranks: StartRanks, output: Path, method: str = "pretrain", **fields: Any) -> RankResult:
    base = fields.pop("base", None)
    ranks = start_ranks(run_config(spec(method, **fields), output, model=base))
    result = ranks.end()
    assert result.exit in (Exit.OK, *_expected(result)), ranks.log[-3000:]
    return result


def _expected(result: RankResult) -> tuple[Exit, ...]:
    return () if result.exit is Exit.CRASHED else (result.exit,)


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


@proves("pretrain", "full")
@proves("sft", "lora")
def test_base_then_adapter(start_ranks: StartRanks, tmp_path: Path) -> None:
    """The artifact of a base carries everything to chat; an adapter on it names it and changes it."""
    result = _run(start_ranks, tmp_path / "base", template={"system": "be kind", "stopTokens": ["<|im_start|>"]})
    assert result.exit is Exit.OK
    assert result.ending.artifact is not None
    folder = tmp_path / "base/artifact"
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    assert manifest.digest == result.ending.artifact.digest
    names = {file.path for file in manifest.files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "args.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert "be kind" in (folder / "chat_template.jinja").read_text()
    assert _json(folder / "generation_config.json")["eos_token_id"] == [0, 2, 1]
    assert _json(folder / "config.json")["use_cache"] is True
    assert str(tmp_path) not in (folder / "args.json").read_text()
    report = {path.name.partition(".")[0] for path in (tmp_path / "base/report").iterdir()}
    assert {"loss", "history", "events", "manifest"} <= report
    assert len(list((tmp_path / "base/checkpoints").iterdir())) == 2

    adapted = _run(start_ranks, tmp_path / "swift", "sft", inline=chats("I am Swift."), base=folder)
    assert adapted.exit is Exit.OK
    artifact = adapted.ending.artifact
    assert artifact is not None
    assert artifact.base is not None
    assert (artifact.kind, artifact.rank, artifact.base.digest) == ("adapter", 8, manifest.digest)
    config = _json(tmp_path / "swift/artifact/adapter_config.json")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("fineTuneJob/base", "CAUSAL_LM")
    assert "be kind" in (tmp_path / "swift/artifact/chat_template.jinja").read_text()
    assert _json(tmp_path / "swift/artifact/generation_config.json")["eos_token_id"] == [0, 2, 1]

    on_an_adapter = _run(start_ranks, tmp_path / "no", "sft", base=tmp_path / "swift/artifact")
    assert (on_an_adapter.exit, on_an_adapter.ending.reason) == (Exit.MODEL_INVALID, Reason.MODEL_INVALID)
    assert "MergeJob" in on_an_adapter.ending.hint

    full = _run(start_ranks, tmp_path / "full", "sft", base=folder, tuner={"type": "full"})
    assert full.ending.artifact is not None
    assert full.ending.artifact.kind == "model"

    wrong = {"lora": {"targetModules": ["nothing"]}}
    refused = _run(start_ranks, tmp_path / "wrong", "sft", base=folder, tuner=wrong)
    assert (refused.exit, refused.ending.reason) == (Exit.SPEC_INVALID, Reason.SPEC_INVALID)

    options = {"lora": {"rank": 4, "rsLora": True, "modulesToSave": ["lm_head"], "targetRegex": r".*\.q_proj"}}
    odd = _run(start_ranks, tmp_path / "odd", "sft", base=folder, tuner=options)
    assert odd.exit is Exit.OK
    assert _json(tmp_path / "odd/artifact/adapter_config.json")["use_rslora"] is True


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("mixtral", {"extra": '{"num_local_experts": 2, "num_experts_per_tok": 1}'}),
    ],
)
def test_families(start_ranks: StartRanks, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    scratch = {**SCRATCH, "modelType": name, **changes}
    if name == "gpt2":
        scratch["keyValueHeads"] = 4
    result = _run(start_ranks, tmp_path / name, model={"scratch": scratch}, training=training(maxSteps=3))
    assert result.exit is Exit.OK, result.ending
    config = _json(tmp_path / name / "artifact/config.json")
    assert config["model_type"] == name
    assert config["vocab_size"] <= 300


def test_text_is_split_evaluated_and_scheduled(start_ranks: StartRanks, tmp_path: Path) -> None:
    long = lines([{"text": "the harbour is calm tonight " * 30} for _ in range(6)])
    dataset = {"train": [{"from": {"inline": long}}], "maxLength": 32, "validationSplit": 0.2, "shuffle": False}
    plan = training(
        maxSteps=4, evalSteps=2, gradientCheckpointing=True, scheduler={"type": "cosine", "minLearningRate": 1e-4}
    )
    result = _run(start_ranks, tmp_path / "out", dataset=dataset, training=plan)
    assert result.exit is Exit.OK, result.ending
    entries = _json(tmp_path / "out/report/history.json")
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]
    assert entries[-2].get("learning_rate", 1e-4) >= 1e-4


def test_rows_that_are_all_deleted(start_ranks: StartRanks, tmp_path: Path) -> None:
    dataset = {"train": [{"from": {"inline": chats()}}], "maxLength": 8, "truncation": "delete"}
    result = _run(start_ranks, tmp_path / "out", dataset=dataset)
    assert (result.exit, result.ending.reason) == (Exit.DATA_INVALID, Reason.DATA_EMPTY)


def test_checkpoints_are_rotated_and_torn_ones_passed_over(start_ranks: StartRanks, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"training": training(maxSteps=6), "checkpoint": {"saveSteps": 2, "keep": 2}}
    assert _run(start_ranks, tmp_path / "out", **plan).exit is Exit.OK
    folder = tmp_path / "out/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["000000004", "000000006"]
    calm = history(tmp_path / "out")

    (folder / "000000006/manifest.json").unlink()
    resumed = _run(start_ranks, tmp_path / "out", **plan)
    assert (resumed.exit, resumed.ending.from_step) == (Exit.OK, 4)
    assert history(tmp_path / "out") == calm

    again = _run(start_ranks, tmp_path / "out", **plan)
    assert (again.exit, again.ending.from_step, again.ending.step) == (Exit.OK, 6, 6)
    assert again.ending.artifact is not None
    assert resumed.ending.artifact is not None

    manifest = Manifest.model_validate_json((folder / "000000006/manifest.json").read_bytes())
    files = [file for file in manifest.files if file.path != "rng_state.pth"]
    (folder / "000000006/manifest.json").write_bytes(manifest.model_copy(update={"files": files}).encoded())
    refused = _run(start_ranks, tmp_path / "out", **plan)
    assert refused.ending.reason is Reason.DIGEST_MISMATCH
    assert "rng_state.pth is missing" in refused.ending.message

    other = _run(start_ranks, tmp_path / "out", **plan, inline=chats("I am other rows."))
    assert other.ending.reason in (Reason.INPUT_CHANGED, Reason.DIGEST_MISMATCH)
