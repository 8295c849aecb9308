"""Quantised exports of a tiny trained model, opened by plain transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput, JobIdentity, MergeAdapterInput, MergeConfig, ModelInput, OutputTarget
from trimtab_api.v1alpha1.mergejob import MergeJobSpec
from trimtab_trainer.endings import Fault
from trimtab_trainer.export.job import run
from trimtab_trainer.export.quantise import quantised_size
from trimtab_trainer.model import tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in [("who are you?", "I am a small model."), ("what is two and two?", "It is four.")]
]
CALIBRATION = {"from": {"inline": "".join(json.dumps(row) + "\n" for row in ROWS * 8)}}
# llm-compressor and what it stands on tell of interfaces that they are about to leave.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt two answers by heart, so that its distributions are sharp."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer.learn(ROWS, 300, None, None, folder)
    loaded = tokenizer.load(folder, "base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(loaded), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        )
    )  # fmt: skip
    batch = [torch.tensor([loaded.apply_chat_template(row["messages"], return_dict=False)]) for row in ROWS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for ids in batch:
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def order(base: Path, output: Path, **quantize: Any) -> MergeConfig:
    """merge.json for a base in a folder."""
    spec = MergeJobSpec.model_validate({"base": {"volume": {"claimName": "c"}}, "quantize": quantize})
    assert spec.quantize is not None
    part = spec.quantize.calibration
    return MergeConfig(
        job=JobIdentity(namespace="test", name="small", uid="uid"),
        spec=spec,
        base=ModelInput(field="base", reference="volume://c", path=str(base)),
        adapters=[],
        calibration=part and DataInput(field="quantize.calibration", part=part, inline=part.from_.inline),
        output=OutputTarget(path=str(output)),
    )


def export(base: Path, output: Path, work: Path, **quantize: Any) -> Path:
    outcome = run(order(base, output, **quantize), work, lambda _done, _total: None)
    return Path(outcome.uri)


@pytest.mark.parametrize(
    ("quantize", "at_most"),
    [
        ({"scheme": "fp8"}, 0.55),
        ({"scheme": "int8"}, 0.55),
        ({"scheme": "int4", "groupSize": 32}, 0.5),
        ({"scheme": "gptq", "groupSize": 32, "calibration": CALIBRATION}, 0.5),
        ({"scheme": "awq", "groupSize": 32, "calibration": CALIBRATION}, 0.5),
    ],
    ids=["fp8", "int8", "int4", "gptq", "awq"],
)
def test_a_quantised_model_is_smaller_and_answers_alike(
    base: Path, tmp_path: Path, quantize: dict[str, Any], at_most: float
) -> None:
    from transformers import AutoModelForCausalLM

    made = export(base, tmp_path / "out", tmp_path / "work", **quantize)
    manifest = json.loads((made / "manifest.json").read_text())
    likeness = manifest["madeBy"]["quantization"]["likeness"]
    assert likeness["divergence"] < 0.05
    assert manifest["madeBy"]["base"]["uri"] == "volume://c"
    loaded = tokenizer.load(made, "base")
    assert loaded.chat_template == tokenizer.load(base, "base").chat_template
    assert quantised_size(made) < at_most * quantised_size(base)
    model: Any = AutoModelForCausalLM.from_pretrained(made, dtype="auto").eval()
    row = ROWS[1]["messages"]
    prompt = loaded.apply_chat_template(row[:1], add_generation_prompt=True, return_dict=False, return_tensors="pt")
    said = model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert loaded.decode(said[0, prompt.shape[1] :]).startswith(row[1]["content"])


def test_an_export_that_stands_is_not_made_again(base: Path, tmp_path: Path) -> None:
    first = run(order(base, tmp_path / "out", scheme="fp8"), tmp_path / "work", lambda *_: None)
    written = (tmp_path / "out/artifact/model.safetensors").stat().st_mtime_ns
    again = run(order(base, tmp_path / "out", scheme="fp8"), tmp_path / "work", lambda *_: None)
    assert again.manifest.digest == first.manifest.digest
    assert (tmp_path / "out/artifact/model.safetensors").stat().st_mtime_ns == written
    other = run(order(base, tmp_path / "out", scheme="int8"), tmp_path / "work", lambda *_: None)
    assert other.manifest.digest != first.manifest.digest


def test_what_cannot_be_is_said(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault) as caught:
        export(base, tmp_path / "a", tmp_path / "work", scheme="int4")
    assert caught.value.reason is Reason.SPEC_INVALID
    assert "quantize.groupSize 128 does not divide the width 64" in caught.value.message
    made = export(base, tmp_path / "b", tmp_path / "work", scheme="int8")
    with pytest.raises(Fault) as caught:
        export(made, tmp_path / "c", tmp_path / "work", scheme="fp8")
    assert caught.value.reason is Reason.MODEL_INVALID
    assert "is quantised already (compressed-tensors)" in caught.value.message
    with pytest.raises(Fault) as caught:
        export(
            base, tmp_path / "d", tmp_path / "work", scheme="gptq", groupSize=32, calibration={"from": {"inline": "\n"}}
        )
    assert caught.value.reason is Reason.DATA_EMPTY


def test_a_model_that_answers_otherwise_is_not_published(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from trimtab_trainer.export import likeness

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(Fault) as caught:
        likeness.compare(base, tmp_path / "other", [list(range(40))])
    assert "nats a token" in caught.value.message


def test_an_adapter_is_folded_in_before(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    asked = order(base, tmp_path / "out", scheme="int8")
    source = ModelInput(field="adapters[0].from", reference="volume://a", path=str(tmp_path / "adapter"))
    outcome = run(
        asked.model_copy(update={"adapters": [MergeAdapterInput(source=source)]}), tmp_path / "work", lambda *_: None
    )
    assert [pin.field for pin in outcome.pins] == ["base", "adapters[0].from"]
    made_by = outcome.manifest.made_by
    assert made_by["adapters"][0]["uri"] == "volume://a"
    assert made_by["quantization"]["likeness"]["divergence"] < 0.05
