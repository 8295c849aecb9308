"""The preflight's verdicts, without torch: a table of what is there and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from tests.unit.trainer.conftest import SCRATCH, chats, conversation, lines, run_config, spec
from trimtab_api.conditions import Reason
from trimtab_api.contract import OutputTarget
from trimtab_trainer import preflight
from trimtab_trainer.endings import Fault
from trimtab_trainer.template import CHATML

Change = Callable[[Path], Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder as the preflight sees it: no weight is opened."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x", "chat_template": CHATML}))
    vocabulary = {letter: index for index, letter in enumerate("abcdefg")}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").touch()
    return folder


def test_sound_inputs(tmp_path: Path, model: Path) -> None:
    ending = preflight.check(run_config(spec("sft"), tmp_path / "out", model=model), tmp_path / "look")
    assert (ending.reason, ending.rows) == (Reason.INPUTS_SOUND, 24)
    assert [pin.field for pin in ending.pins] == ["model.from", "dataset.train[0]"]
    assert list((tmp_path / "out").iterdir()) == []


def _config(**keys: Any) -> Change:
    return lambda folder: (folder / "config.json").write_text(json.dumps(keys))


def _without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (_without("config.json"), Reason.MODEL_INVALID, "no config.json"),
        (_config(nothing=1), Reason.MODEL_INVALID, "names no model_type"),
        (_config(model_type="llama", vocab_size=4), Reason.MODEL_INVALID, "has 7 tokens, the model embeddings for 4"),
        (_without("model.safetensors"), Reason.UNSAFE_FORMAT, "no *.safetensors"),
        (_without("tokenizer.json"), Reason.MODEL_INVALID, "no tokenizer.json"),
        (_without("tokenizer_config.json"), Reason.CHAT_TEMPLATE_MISSING, "no chat template"),
        (lambda folder: (folder / "adapter_config.json").touch(), Reason.MODEL_INVALID, "is an adapter"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), Reason.MODEL_INVALID, "line 1"),
    ],
)
def test_a_model_that_does_not_fit(tmp_path: Path, model: Path, change: Change, reason: Reason, said: str) -> None:
    change(model)
    with pytest.raises(Fault) as caught:
        preflight.check(run_config(spec("sft"), tmp_path / "out", model=model), tmp_path / "look")
    assert caught.value.reason is reason
    assert said in caught.value.message
    assert caught.value.hint


REWRITES = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
TWO_TURNS = lines([conversation("a", "b", "c", "d")])


@pytest.mark.parametrize(
    ("fields", "reason", "said"),
    [
        ({"template": {"chatTemplate": "{% endif %}"}}, Reason.SPEC_INVALID, "template.chatTemplate"),
        ({"template": {"chatTemplate": "{{ raise_exception('no') }}"}}, Reason.DATA_INVALID, "refuses a conversation"),
        ({"inline": TWO_TURNS, "template": {"chatTemplate": REWRITES}}, Reason.SPEC_INVALID, "earlier turns"),
    ],
)
def test_a_template_that_does_not_fit(
    tmp_path: Path, model: Path, fields: dict[str, Any], reason: Reason, said: str
) -> None:
    with pytest.raises(Fault) as caught:
        preflight.check(run_config(spec("sft", **fields), tmp_path / "out", model=model), tmp_path / "look")
    assert caught.value.reason is reason
    assert said in caught.value.message


def test_rows_that_are_all_too_long(tmp_path: Path, model: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    dataset = {"train": [{"from": {"inline": chats()}}], "maxLength": 8}
    with pytest.raises(Fault) as caught:
        preflight.check(run_config(spec("sft", dataset=dataset), tmp_path / "out", model=model), tmp_path / "look")
    assert caught.value.reason is Reason.DATA_EMPTY


@pytest.mark.parametrize(
    ("scratch", "said"),
    [({"modelType": "lama"}, "knows no 'lama'"), ({"extra": "{"}, "extra: not JSON"), ({"extra": "[]"}, "JSON object")],
)
def test_a_scratch_model_that_cannot_be(tmp_path: Path, scratch: dict[str, Any], said: str) -> None:
    wanted = spec(model={"scratch": {**SCRATCH, **scratch}})
    with pytest.raises(Fault, match=said) as caught:
        preflight.check(run_config(wanted, tmp_path / "out"), tmp_path / "look")
    assert caught.value.reason is Reason.SPEC_INVALID


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(Fault) as caught:
        preflight.check(run_config(spec(), tmp_path, target=OutputTarget()), tmp_path / "look")
    assert caught.value.reason is Reason.OUTPUT_MISSING


def test_neither_torch_nor_transformers_is_imported() -> None:
    heavy = (
        "import sys, trimtab_trainer.preflight; sys.exit(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", heavy], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) in ((0, ""), (1, "[]\n"))


@pytest.mark.parametrize(("text", "number"), [("16Gi", 16 * 2**30), ("500m", 0.5), (2, 2), ("1.5G", 1.5e9)])
def test_quantities(text: str | int, number: float) -> None:
    assert preflight.quantity(text) == number


@pytest.mark.timeout(120)
def test_many_rows_are_tokenised_before_an_accelerator_is_held(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab_trainer.data import kept

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spelling = tokenizers.Tokenizer(tokenizers.models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    spelling.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.save(str(model / "tokenizer.json"))
    _config(model_type="llama", vocab_size=len(alphabet))(model)
    config = run_config(spec("sft"), tmp_path / "out", model=model)
    preflight.look(config, tmp_path / "few")
    assert not (tmp_path / "out/sequences").exists()
    monkeypatch.setattr(preflight, "TOKENISED_FROM", 1)
    monkeypatch.setattr(kept, "WORTH_KEEPING", 1)
    preflight.look(config, tmp_path / "many")
    (folder,) = (tmp_path / "out/sequences").iterdir()
    assert {path.name for path in folder.iterdir()} == {"manifest.json", kept.TRAIN}
