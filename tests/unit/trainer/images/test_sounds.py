"""Conversations that play sound: what the library makes of it, what is learnt, and what is wrong with it."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation, run_config, spec
from tests.unit.trainer.images.conftest import Rows, run_here
from tests.unit.trainer.images.films import file_of, kept, tone, uri
from trimtab_api.conditions import Reason
from trimtab_trainer import preflight
from trimtab_trainer.data.opened import Named, gather
from trimtab_trainer.data.seen import Seen, Standing, spacious
from trimtab_trainer.data.sound import Sound, samples
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods import METHODS
from trimtab_trainer.methods.vision import Looking
from trimtab_trainer.model import senses, tokenizer, vision
from trimtab_trainer.template import ChatTemplate

pytestmark = pytest.mark.timeout(300)

FULL: dict[str, Any] = {"type": "full"}
LORA: dict[str, Any] = {"lora": {"rank": 8, "dropout": 0}}
TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'audio' %}{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ASKED = "<audio>high or low?"
PITCHES = {"high": range(1800, 3000, 150), "low": range(200, 500, 37)}
"""Hertz."""
UNHEARD = {"high": (1875, 2175, 2625), "low": (219, 330, 441)}
RATE = 16000


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that hears: two layers of a tower, two of language."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    folder = tmp_path_factory.mktemp("hearing")
    tokenizer.learn([conversation("high or low?", each) for each in PITCHES], 300, None, None, folder)
    loaded: Any = tokenizer.load(folder, "model.from")
    loaded.add_tokens(TOKENS, special_tokens=True)
    loaded.chat_template = TEMPLATE
    heard = WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=RATE)
    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
            "num_mel_bins": 16, "max_source_positions": 50,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(loaded), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "eos_token_id": loaded.eos_token_id, "bos_token_id": None, "pad_token_id": loaded.pad_token_id,
        },
        audio_token_index=loaded.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    model: Any = Qwen2AudioForConditionalGeneration(config)
    with torch.no_grad():
        # A tower of random weights says little of what it hears.
        model.model.audio_tower.conv1.weight.normal_(0, 0.5)
        model.model.audio_tower.conv2.weight.normal_(0, 0.3)
        model.model.audio_tower.embed_positions.weight.zero_()
    model.save_pretrained(folder)
    Qwen2AudioProcessor(feature_extractor=heard, tokenizer=loaded, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def played(hertz: float, *answer: str, seconds: float = 0.3) -> dict[str, Any]:
    """A question about a tone, with an answer or without."""
    return {**conversation(ASKED, *answer), "audios": [uri(tone(seconds, hertz, rate=8000), "audio/wav")]}


def tones(pitches: dict[str, Iterable[int]], **columns: str) -> Rows:
    """Tones that are called what they are, with columns that say it too."""
    return [
        {**played(hertz, name), **{key: value.format(name) for key, value in columns.items()}}
        for name, all_of_it in pitches.items()
        for hertz in all_of_it
    ]


def test_a_batch_is_what_the_library_makes(hearing: Path, tmp_path: Path) -> None:
    """Token ids and tensors of two rows of unlike length, at another rate than the model hears and on two channels."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    kept(tmp_path, "a.wav", tone(0.3, 440, rate=22050))
    kept(tmp_path, "b.wav", _both_ears(tone(0.55, 900)))
    names = [[str(tmp_path / "a.wav")], [str(tmp_path / "b.wav"), str(tmp_path / "a.wav")]]
    rows: Rows = [
        {**conversation("<audio>what?", "low"), "audios": names[0]},
        {**conversation("<audio> and <audio>what?", "high"), "audios": names[1]},
    ]
    loaded = tokenizer.load(hearing, "model.from")
    processor = vision.load_processor(hearing, loaded, "model.from")
    able = senses.Senses(processor)
    media = gather([Named("audio", each, "row") for row in names for each in row], [], tmp_path / "into")
    standing = Standing(media, able.placeholders, able.ids, able.text)
    template = ChatTemplate.of(loaded.chat_template, None, None, {})
    config = run_config(spec("sft", dataset={"train": [{"from": {"inline": "{}"}}]}), tmp_path / "out")
    encoder = Seen(METHODS["sft"].encoder(config, loaded, spacious(template.renderer(), standing)), standing)
    records = list(encoder.encode(rows))
    ids = torch.full((2, max(len(each["input_ids"]) for each in records)), loaded.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, record in enumerate(records):
        ids[row, : len(record["input_ids"])] = torch.tensor(record["input_ids"])
        mask[row, : len(record["input_ids"])] = 1
    ours = Looking(processor, media)({"input_ids": ids, "attention_mask": mask})

    library: Any = AutoProcessor.from_pretrained(hearing)
    sounds = [samples(Path(each), _about(each, media), RATE) for row in names for each in row]
    assert [len(each) for each in sounds] == [4800, 8800, 4800]
    assert numpy.abs(sounds[1]).max() == pytest.approx(20000 / 32768, abs=0.02)
    said = [
        template.renderer()([{**each, "content": _parts(each["content"])} for each in row["messages"]]) for row in rows
    ]
    theirs = library(
        text=said, audio=sounds, sampling_rate=RATE, padding=True, padding_side="right", return_tensors="pt"
    )
    assert set(ours) == set(theirs)
    for key in theirs:
        exact = not theirs[key].is_floating_point()
        assert (torch.equal if exact else torch.allclose)(ours[key], theirs[key]), key
    model: Any = AutoModelForMultimodalLM.from_pretrained(hearing).eval()
    with torch.no_grad():
        assert torch.allclose(model(**ours).logits, model(**theirs).logits, atol=1e-5)


def _about(name: str, media: Any) -> Sound:
    about = media.shown[media.index["audio", name]].about
    assert isinstance(about, Sound)
    return about


def _both_ears(content: bytes) -> bytes:
    stream = io.BytesIO()
    with wave.open(io.BytesIO(content)) as one, wave.open(stream, "wb") as two:
        two.setparams(one.getparams()._replace(nchannels=2))
        two.writeframes(numpy.repeat(numpy.frombuffer(one.readframes(one.getnframes()), "<i2"), 2).tobytes())
    return stream.getvalue()


def _parts(text: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for number, piece in enumerate(text.split("<audio>")):
        found += [{"type": "audio"}] if number else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def share_right(base: Path, folder: Path) -> float:
    """How often the right name is the likelier, of tones that no row plays."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    adapted = (folder / "adapter_config.json").is_file()
    model: Any = AutoModelForMultimodalLM.from_pretrained(base if adapted else folder)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    processor: Any = AutoProcessor.from_pretrained(folder)
    asked = [(name, hertz) for name, pitches in UNHEARD.items() for hertz in pitches]
    right = 0
    for name, hertz in asked:
        scores = {said: _likelihood(model.eval(), processor, hertz, said) for said in PITCHES}
        right += scores[name] == max(scores.values())
    return right / len(asked)


def _likelihood(model: Any, processor: Any, hertz: float, said: str) -> float:
    heard = (numpy.sin(numpy.arange(int(0.3 * RATE)) * 2 * numpy.pi * hertz / RATE) * 20000 / 32768).astype("float32")
    content = _parts(ASKED)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )

    def batch(text: str) -> Any:
        return processor(text=[text], audio=[heard], sampling_rate=RATE, return_tensors="pt")

    start, whole = batch(prompt)["input_ids"].shape[1], batch(f"{prompt}{said}<|im_end|>")
    with torch.no_grad():
        logits = model(**whole).logits[0, :-1].log_softmax(-1)
    ids = whole["input_ids"][0]
    return float(logits[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())


def see_ears_alone(base: Path, folder: Path) -> None:
    """What makes tokens of sound is what it was, and adapters are on the language model alone."""
    if (folder / "adapter_model.safetensors").is_file():
        names = load_file(folder / "adapter_model.safetensors")
        assert names
        assert all("language_model" in name for name in names), sorted(names)
        return
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    ears = [name for name in before if "audio_tower" in name or "projector" in name]
    assert ears
    assert all(torch.equal(before[name], after[name]) for name in ears)


@pytest.fixture(scope="module")
def mistaking(hearing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hears the difference, and calls all by the wrong name."""
    other = {"high": "low", "low": "high"}
    rows = [played(hertz, other[name]) for name, pitches in PITCHES.items() for hertz in pitches]
    folder = tmp_path_factory.mktemp("mistaking")
    plan = {"maxSteps": 60, "learningRate": 1e-2, "perDeviceBatchSize": 16, "loggingSteps": 10}
    return run_here("sft", file_of(rows, folder / "rows"), folder / "base", hearing, tuner=FULL, training=plan).folder


@proves("sft", "audio")
def test_high_and_low_are_learnt(mistaking: Path, tmp_path: Path) -> None:
    """By all weights of a model that knew nothing, and by an adapter on it, which is told otherwise."""
    rows = file_of(tones(PITCHES), tmp_path / "rows")
    plan = {"maxSteps": 20, "perDeviceBatchSize": 8, "learningRate": 1e-2}
    done = run_here("sft", rows, tmp_path / "out", mistaking, tuner=LORA, training=plan)
    assert share_right(mistaking, mistaking) < 0.2
    assert share_right(mistaking, done.folder) > 0.8
    see_ears_alone(mistaking, done.folder)
    assert (done.folder / "processor_config.json").is_file()


@proves("pretrain", "audio")
def test_sound_is_pretrained_on(mistaking: Path, tmp_path: Path) -> None:
    plan = {"maxSteps": 20, "perDeviceBatchSize": 8, "learningRate": 5e-3, "evalSteps": 20, "evaluateAtStart": True}
    rows = file_of(tones(PITCHES), tmp_path / "rows")
    done = run_here("pretrain", rows, tmp_path / "out", mistaking, tones(UNHEARD), tuner=FULL, training=plan)
    before, after = done.logged("eval_loss")
    assert after < 0.5 * before
    see_ears_alone(mistaking, done.folder)


def preflighted(content: bytes, hearing: Path, into: Path) -> Any:
    """What the preflight says of a row that plays this."""
    import json

    row = {**conversation(ASKED, "high"), "audios": [uri(content, "audio/wav")]}
    return preflight.check(run_config(spec("sft", inline=json.dumps(row)), into / "out", model=hearing), into / "work")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no sound", "does not open as sound"), (tone(0.5)[:9000], "is cut short"), (tone(0.0), "has no sound")],
)
def test_sounds_are_opened_before_the_training(content: bytes, said: str, hearing: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=said) as caught:
        preflighted(content, hearing, tmp_path)
    assert caught.value.reason is Reason.DATA_INVALID
    assert caught.value.message.startswith("training row 1: audio data:audio/wav;base64,")


def test_sound_that_is_longer_than_a_model_hears_is_told(hearing: Path, tmp_path: Path) -> None:
    """The library would leave out the end of it without a word."""
    assert preflighted(tone(0.3), hearing, tmp_path).reason is Reason.INPUTS_SOUND
    processor = vision.load_processor(hearing, tokenizer.load(hearing, "model.from"), "model.from")
    with pytest.raises(Fault, match=r"a sound is 1\.5 seconds long, and the model hears 1"):
        senses.Senses(processor).text(Sound(12000, 8000))


def test_a_model_that_hears_nothing_is_told(seeing: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="the rows show audios and the model has no hearing") as caught:
        preflighted(tone(0.3), seeing, tmp_path)
    assert caught.value.reason is Reason.MODEL_INVALID
