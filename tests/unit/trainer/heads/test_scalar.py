"""The room of scalar heads: what opens, what is refused, and that scores do not depend on the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.unit.trainer.conftest import conversation
from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel, Pins
from trimtab_trainer.merge.lineage import fetch_with_base
from trimtab_trainer.model import scalar, tokenizer

TALKS = [
    conversation("the storm", "a sail")["messages"],
    conversation("calm sea today", "we saw the ship and the harbour")["messages"],
    conversation("rain", "fog")["messages"],
]


def _load(local: LocalModel, labels: int = 1, seed: int = 42) -> Any:
    return scalar.load(local, "model.from", torch.float32, labels=labels, seed=seed, pad_token_id=0)


def _publish(model: Any, local: LocalModel, into: Path) -> LocalModel:
    model.save_pretrained(into)
    tokenizer.load(local.path, "base").save_pretrained(into)
    return LocalModel(path=into, reference="s3://models/reward", digest=None)


def _adapter(local: LocalModel, into: Path, **settings: Any) -> tuple[Any, LocalModel]:
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False, **settings)
    tuned = get_peft_model(_load(local), config).eval()
    published = _publish(tuned, local, into)
    return tuned, replace(published, base=local)


def test_the_head_alone_is_new(local: LocalModel) -> None:
    model = _load(local, labels=3)
    assert scalar.head_names(model) == {"score.weight"}
    assert scalar.head_modules(model) == ["score"]
    assert (model.config.num_labels, model.config.pad_token_id) == (3, 0)
    again = _load(local, labels=3)
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, _load(local, labels=3, seed=7).score.weight)


def test_a_base_with_a_hole_is_refused(local: LocalModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(local.path, tmp_path / "torn")
    weights = load_file(tmp_path / "torn/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "torn/model.safetensors", {"format": "pt"})
    with pytest.raises(Fault, match=r"1 weights are missing, first model\.norm\.weight"):
        _load(replace(local, path=tmp_path / "torn"))


def test_whole_and_adapter_give_the_scores_they_were_published_with(local: LocalModel, tmp_path: Path) -> None:
    model = _load(local, labels=2).eval()
    judge = scalar.open_published(_publish(model, local, tmp_path / "whole"), "rewardModel", torch.float32)
    wanted = scalar.score(model, judge.tokenizer, judge.template, TALKS)
    assert torch.equal(judge(TALKS), wanted)
    assert wanted.shape == (3, 2)
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())

    tuned, published = _adapter(local, tmp_path / "adapter")
    opened = scalar.open_published(published, "rewardModel", torch.float32)
    assert torch.equal(opened(TALKS), scalar.score(tuned, judge.tokenizer, judge.template, TALKS))
    assert opened(TALKS).shape == (3, 1)


def test_scores_do_not_depend_on_the_batch(local: LocalModel, tmp_path: Path) -> None:
    judge = scalar.open_published(_publish(_load(local), local, tmp_path / "whole"), "rewardModel", torch.float32)
    together, apart = judge(TALKS, batch=3), torch.cat([judge([talk]) for talk in TALKS])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert not torch.equal(judge(TALKS, max_length=4), together)
    ids = [judge.tokenizer(judge.template.renderer()(talk), add_special_tokens=False)["input_ids"] for talk in TALKS]
    assert torch.equal(scalar.score_ids(judge.model, ids), together)


def test_what_is_refused(local: LocalModel, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="has no head that gives scores"):
        scalar.open_published(local, "ppo.rewardModel", torch.float32)
    published = _publish(_load(local, labels=2), local, tmp_path / "two")
    with pytest.raises(Fault, match="its head has 2 outputs, 3 are wanted"):
        _load(published, labels=3)
    assert torch.equal(_load(published, labels=2).score.weight, _load(published, labels=2, seed=7).score.weight)

    _, adapter = _adapter(local, tmp_path / "adapter")
    with pytest.raises(Fault, match="the model that it was trained on is not here"):
        scalar.open_published(replace(adapter, base=None), "ppo.rewardModel", torch.float32)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: each for name, each in weights.items() if "score" not in name}, file)
    with pytest.raises(Fault, match="brings no head"):
        scalar.open_published(adapter, "ppo.rewardModel", torch.float32)
    save_file({**weights, "base_model.model.model.layers.7.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(Fault, match="1 tensors fit nothing") as caught:
        scalar.open_published(adapter, "ppo.rewardModel", torch.float32)
    assert caught.value.reason is Reason.BASE_MISMATCH
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "CAUSAL_LM"}))
    with pytest.raises(Fault, match="is an adapter for CAUSAL_LM"):
        scalar.open_published(adapter, "ppo.rewardModel", torch.float32)


def test_an_adapter_comes_with_its_base(local: LocalModel, tmp_path: Path) -> None:
    _, adapter = _adapter(local, tmp_path / "adapter")
    (adapter.path / "args.json").write_text(json.dumps({"base": {"uri": str(local.path)}}))
    source = ModelInput(field="ppo.rewardModel", reference="fineTuneJob/reward", path=str(adapter.path))
    found = fetch_with_base(source, tmp_path / "work", Pins([]))
    assert found.base is not None
    assert found.base.path == local.path
    assert scalar.open_published(found, "ppo.rewardModel", torch.float32)(TALKS).shape == (3, 1)


def test_a_head_on_eyes_is_loaded_whole(local: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalar.vision, "senses", lambda _folder: {"image"})
    monkeypatch.setattr(scalar.vision, "scalar_class", lambda *_: None)
    with pytest.raises(Fault, match="neither quantised nor over devices"):
        scalar.load(local, "model.from", torch.float32, labels=1, seed=1, pad_token_id=0, device_map="auto")
