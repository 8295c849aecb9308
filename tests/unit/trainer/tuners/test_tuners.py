"""Which weights move, and that what is published is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import chats, history
from tests.unit.trainer.tuners.conftest import adapter_input, document, logits, made, tune
from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the trained model says, taken before anything is published."""
    from trimtab_trainer import publish

    said: list[Any] = []
    whole = publish.write

    def listen(tuned: Any, *rest: Any) -> None:
        import torch

        with torch.no_grad():
            said.append(tuned.model.eval()(input_ids=torch.arange(24).unsqueeze(0)).logits.clone())
        whole(tuned, *rest)

    monkeypatch.setattr(publish, "write", listen)
    return said


@pytest.mark.parametrize(
    ("start", "more"),
    [("pissa", {}), ("pissa_niter_4", {"rsLora": True}), ("olora", {"alpha": 8}), ("gaussian", {"bias": "all"})],
)
def test_base_and_published_adapter_are_the_trained_model(
    base: Path, tmp_path: Path, trained: list[Any], start: str, more: dict[str, Any]
) -> None:
    import torch

    ending = tune(base, tmp_path / "out", {"lora": {"rank": 4, "dropout": 0, "initWeights": start, **more}})
    assert ending.artifact is not None
    folder = tmp_path / "out/artifact"
    config = document(folder / "adapter_config.json")
    taken_out = start != "gaussian"
    assert ending.artifact.rank == config["r"] == (8 if taken_out else 4)
    assert config["init_lora_weights"] in (True, "gaussian")
    published = logits(base, folder)
    assert torch.allclose(published, trained[0], atol=2e-4), (published - trained[0]).abs().max()
    assert (published - logits(base)).abs().max() > 0.01


def test_a_start_that_takes_out_is_not_noise(base: Path, tmp_path: Path) -> None:
    """PiSSA's first loss is the base's, and it falls faster than with a start at zero (Meng et al. 2024)."""
    plan = {"maxSteps": 8, "learningRate": 1e-3}
    tune(base, tmp_path / "plain", {"lora": {"rank": 4, "alpha": 4, "dropout": 0}}, training=plan)
    tune(
        base, tmp_path / "pissa", {"lora": {"rank": 4, "alpha": 4, "dropout": 0, "initWeights": "pissa"}}, training=plan
    )
    plain, pissa = history(tmp_path / "plain"), history(tmp_path / "pissa")
    assert pissa[0][1] == pytest.approx(plain[0][1], rel=1e-3)
    assert pissa[-1][1] < plain[-1][1]


def test_a_start_is_kept_for_later_attempts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has the very base that the first attempt had, and ends with the same weights."""
    import shutil

    from trimtab_trainer.model import beneath

    tuner = {"lora": {"rank": 4, "initWeights": "pissa_niter_2"}}
    whole = tune(base, tmp_path / "out", tuner, checkpoint={"saveSteps": 2, "keep": 3})
    calm = history(tmp_path / "out")
    for gone in ("checkpoints/000000004", "artifact"):
        shutil.rmtree(tmp_path / "out" / gone)
    monkeypatch.setattr(beneath, "start", lambda *_: pytest.fail("the start is made anew"))
    again = tune(base, tmp_path / "out", tuner, checkpoint={"saveSteps": 2, "keep": 3})
    assert again.from_step == 2
    assert history(tmp_path / "out") == calm
    assert whole.artifact is not None
    assert again.artifact is not None
    assert again.artifact.digest == whole.artifact.digest


def test_an_adapter_goes_on(base: Path, tmp_path: Path, trained: list[Any]) -> None:
    import torch

    first = {"lora": {"rank": 4, "dropout": 0, "targetModules": ["q_proj", "v_proj"]}}
    tune(base, tmp_path / "first", first)
    lower = tmp_path / "first/artifact"
    source = {"fineTuneJob": {"name": "first"}}
    on = tune(base, tmp_path / "on", {"continueFrom": source}, further=[adapter_input("tuner.continueFrom", lower)])
    assert on.artifact is not None
    assert on.artifact.rank == 4
    assert history(tmp_path / "on")[0][1] < history(tmp_path / "first")[0][1]
    assert torch.allclose(logits(base, tmp_path / "on/artifact"), trained[1], atol=1e-5)

    other = made(tmp_path / "other", hiddenSize=48)
    with pytest.raises(Fault) as refused:
        tune(other, tmp_path / "no", {"continueFrom": source}, further=[adapter_input("tuner.continueFrom", lower)])
    assert refused.value.reason is Reason.BASE_MISMATCH


def test_an_adapter_on_adapters_is_one_adapter_on_the_base(base: Path, tmp_path: Path, trained: list[Any]) -> None:
    import torch

    narrow = {"lora": {"rank": 2, "alpha": 3, "dropout": 0, "targetModules": ["q_proj"]}}
    wide = {"lora": {"rank": 4, "rsLora": True, "dropout": 0}}
    tune(base, tmp_path / "narrow", narrow)
    tune(base, tmp_path / "wide", wide)
    lowers = [tmp_path / "narrow/artifact", tmp_path / "wide/artifact"]
    further = [adapter_input(f"tuner.adapters[{n}].from", folder) for n, folder in enumerate(lowers)]
    named = [{"from": {"fineTuneJob": {"name": "narrow"}}}, {"from": {"fineTuneJob": {"name": "wide"}}}]
    top = {"adapters": named, "lora": {"rank": 3, "dropout": 0, "initWeights": "pissa"}}
    ending = tune(base, tmp_path / "top", top, further=further, inline=chats("I am Harbour."))
    assert ending.artifact is not None
    assert ending.artifact.rank == 2 + 4 + 3 + 3
    assert torch.allclose(logits(base, tmp_path / "top/artifact"), trained[-1], atol=2e-4)

    little = {"adapters": named, "lora": {"targetModules": ["v_proj"]}}
    with pytest.raises(Fault, match=r"which tuner\.lora does not"):
        tune(base, tmp_path / "little", little, further=further)
    tune(base, tmp_path / "dora", {"lora": {"rank": 2, "dora": True}})
    with pytest.raises(Fault, match="use_dora"):
        tune(
            base,
            tmp_path / "no",
            {"adapters": named[:1]},
            further=[adapter_input("tuner.adapters[0].from", tmp_path / "dora/artifact")],
        )


def test_lora_plus_lets_the_second_factor_learn_faster(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    rates: list[list[tuple[float, int]]] = []
    whole = Trainer.create_scheduler

    def listen(trainer: Any, *args: Any, **keywords: Any) -> Any:
        groups = trainer.optimizer.param_groups
        rates.append([(group["lr"], len(group["params"])) for group in groups if group["params"]])
        return whole(trainer, *args, **keywords)

    monkeypatch.setattr(Trainer, "create_scheduler", listen)
    tune(base, tmp_path / "out", {"lora": {"rank": 4, "loraPlusRatio": 16}})
    assert sorted(rate for rate, _ in rates[0]) == pytest.approx([2e-3, 3.2e-2])
    assert len({count for _, count in rates[0]}) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_trained_in_full(base: Path, tmp_path: Path, tied: bool) -> None:
    import torch
    from safetensors.torch import load_file

    under = made(tmp_path / "base") if tied else base
    tune(under, tmp_path / "out", {"lora": {"rank": 2, "modulesToSave": ["embeddings", "head"]}})
    tensors = load_file(tmp_path / "out/artifact/adapter_model.safetensors")
    before = load_file(under / "model.safetensors")
    embedded = before["model.embed_tokens.weight"]
    for name, old in (("model.embed_tokens", embedded), ("lm_head", before.get("lm_head.weight", embedded))):
        assert not torch.allclose(tensors[f"base_model.model.{name}.weight"], old, atol=1e-4), name


def roomy(base: Path, into: Path) -> Path:
    """The base with rows to spare in its embeddings, as most published ones have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(304, mean_resizing=False)
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(base).save_pretrained(into)
    return into


@pytest.mark.parametrize("type_", ["full", "lora"])
def test_new_tokens_are_one_token_each_and_learnt(base: Path, tmp_path: Path, type_: str) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    wanted = {"from": {"fineTuneJob": {"name": "base"}}, "newTokens": ["<|tool|>", "<|stop|>"]}
    rows = chats("<|tool|>I am Swift.<|stop|>")
    if type_ == "lora":
        with pytest.raises(Fault, match=r"do not fit the 300 rows"):
            tune(base, tmp_path / "no", {"type": type_}, inline=rows, model=wanted)
        base = roomy(base, tmp_path / "base")
    tune(base, tmp_path / "out", {"type": type_}, inline=rows, model=wanted)
    folder = tmp_path / "out/artifact"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<|tool|><|stop|>", add_special_tokens=False)["input_ids"]
    assert ids == [300, 301]
    if type_ == "full":
        tensors = load_file(folder / "model.safetensors")
        rows_of = tensors["model.embed_tokens.weight"]
        assert document(folder / "config.json")["vocab_size"] == 302
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        rows_of = next(each for name, each in tensors.items() if "trainable_tokens" in name or "token_indices" in name)
        assert document(folder / "adapter_config.json")["trainable_token_indices"] == {"embed_tokens": [300, 301]}
    assert (rows_of[-1] - rows_of[-2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("freeze", "moved", "still"),
    [
        ({"embeddings": True, "layers": 1}, ["layers.1.mlp", "lm_head"], ["layers.0", "embed_tokens"]),
        (
            {"ratio": 0.5, "trainableRegex": r".*layers\.0\.input_layernorm"},
            ["layers.0.input_layernorm"],
            ["layers.0.mlp"],
        ),
        ({"regex": r".*mlp"}, ["self_attn"], ["mlp"]),
        ({"trainableRegex": r".*norm"}, ["norm"], ["mlp", "self_attn", "embed_tokens", "lm_head"]),
    ],
)
def test_freezing(base: Path, tmp_path: Path, freeze: dict[str, Any], moved: list[str], still: list[str]) -> None:
    import torch
    from safetensors.torch import load_file

    tune(base, tmp_path / "out", {"type": "full", "freeze": freeze}, training={"learningRate": 1e-2})
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/artifact/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(any(part in name for name in changed) for part in moved), changed
    assert not [name for name in changed if any(part in name for part in still) and not any(m in name for m in moved)]


def test_freezing_that_cannot_be(base: Path, tmp_path: Path) -> None:
    for freeze, part in (
        ({"layers": 3}, "the model has 2 blocks"),
        ({"regex": ".*nothing"}, "no parameter is named so"),
        ({"regex": "("}, "not an expression"),
        ({"regex": ".*"}, "no parameter would move"),
    ):
        with pytest.raises(Fault, match=part):
            tune(base, tmp_path / "no", {"type": "full", "freeze": freeze})


def test_a_mixture_of_experts(tmp_path: Path, trained: list[Any]) -> None:
    """Routers stay, experts are reached as parameters, dropout is 0 by itself."""
    import torch

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    extra = json.dumps({**sizes, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32})
    base = made(tmp_path / "base", modelType="qwen2_moe", extra=extra)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tune(base, tmp_path / "out", {"lora": {"rank": 2, "targetParameters": experts}})
    config = document(tmp_path / "out/artifact/adapter_config.json")
    assert config["lora_dropout"] == 0
    assert sorted(config["target_parameters"]) == sorted(experts)
    from safetensors import safe_open

    with safe_open(tmp_path / "out/artifact/adapter_model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    assert any("experts" in name for name in names)
    assert not [name for name in names if "gate." in name.replace("gate_up", "")]
    assert torch.allclose(logits(base, tmp_path / "out/artifact"), trained[-1], atol=1e-5)


def test_an_adapter_on_the_head_is_refused(base: Path, tmp_path: Path) -> None:
    """By a regular expression no rule sees it; the library would end with an error of its own."""
    with pytest.raises(Fault, match="an adapter on the head is not trained") as caught:
        tune(base, tmp_path / "out", {"lora": {"targetRegex": r".*(q_proj|lm_head)"}})
    assert caught.value.reason is Reason.SPEC_INVALID
