"""Rendering and masks: which characters are learnt, and that the template is run as transformers runs it."""

from __future__ import annotations

import pytest

from tests.unit.trainer.conftest import conversation
from trimtab_api.conditions import Reason
from trimtab_trainer.data.masks import learnt, render_row
from trimtab_trainer.endings import Fault
from trimtab_trainer.template import CHATML, ChatTemplate, special_tokens_in, template_in, with_system

ROW = conversation("hi", "hello", "more", "enough", system="be kind")
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}thought {% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _render(source: str = CHATML):  # type: ignore[no-untyped-def]
    return ChatTemplate.of(source, None, None, {"eos_token": "</s>"}).renderer()


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [("assistant", ["hello<|im_end|>", "enough<|im_end|>"]), ("lastTurn", ["enough<|im_end|>"])],
)
def test_answers_with_their_end_are_learnt(loss: str, wanted: list[str]) -> None:
    text, spans = render_row(ROW, _render(), loss)  # type: ignore[arg-type]
    assert [text[slice(*span)] for span in spans] == wanted
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n")


def test_all_learns_all() -> None:
    text, spans = render_row(ROW, _render(), "all")
    assert spans == [(0, len(text))]
    assert render_row({"text": "plain"}, None, "assistant") == ("plain", [(0, 5)])


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last_turn() -> None:
    with pytest.raises(Fault) as caught:
        render_row(conversation("a", "b", "c", "d"), _render(THINKING), "assistant")
    assert caught.value.reason is Reason.SPEC_INVALID
    assert "lastTurn" in caught.value.hint
    text, spans = render_row(conversation("a", "b", "c", "d"), _render(THINKING), "lastTurn")
    assert text[slice(*spans[0])] == "thought d</s>"


def test_tokens_across_a_start_are_not_learnt() -> None:
    assert learnt([(0, 2), (2, 5), (5, 8), (8, 9)], [(3, 8)]) == [False, False, True, False]
    assert learnt([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)]) == [True, False, True]


@pytest.mark.parametrize("system", ["plain", 'it\'s \\ "quoted"\nü 🌊 {{ no }}', None])
def test_the_system_prompt_is_written_into_the_template(system: str | None) -> None:
    render = ChatTemplate.of(CHATML, None, system, {}).renderer()
    asked = render([{"role": "user", "content": "q"}], add_generation_prompt=True)
    begins = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert asked == begins + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert render(ROW["messages"]).count("<|im_start|>system") == 1


@pytest.mark.parametrize(
    "source", [CHATML, THINKING, with_system(CHATML, "s"), "{{ messages | tojson }}{{ eos_token }}"]
)
def test_it_renders_as_transformers_does(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([ROW["messages"]], chat_template=source, eos_token="</s>")
    assert _render(source)(ROW["messages"]) == theirs[0]


def test_templates_and_tokens_are_found_beside_a_tokenizer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "E"}, "bos_token": "B", "chat_template": '
        '[{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}'
    )
    assert template_in(tmp_path) == "d"
    assert special_tokens_in(tmp_path) == {"eos_token": "E", "bos_token": "B"}
    (tmp_path / "chat_template.jinja").write_text("j")
    assert template_in(tmp_path) == "j"
