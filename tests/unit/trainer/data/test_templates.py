"""Training and serving render the same: by the text of what families published, and by its tokens."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers

from tests.unit.trainer.conftest import conversation
from trimtab_api.v1alpha1.dataset import Template
from trimtab_trainer.data.masks import render_row
from trimtab_trainer.endings import Fault
from trimtab_trainer.template import CHATML, ChatTemplate, asked_for

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def published(name: str) -> str:
    """A family's own template, as TRL carries it to know it by."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()


NAMED = {
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma3": "gemma3",
}
FAMILIES = (
    *NAMED.values(), "cohere", "cohere2", "glm4moe", "lfm2", "llama3_2", "phi3", "phi3_5",
    "qwen3_instruct_2507", "qwen3_5_nothink",
)  # fmt: skip


def _served(source: str, messages: list[dict[str, Any]], **asked: Any) -> str:
    """The prompt as transformers, and so vLLM, renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **SPECIAL, **asked
    )
    return str(rendered[0])


def _tokenizer(source: str) -> tokenizers.Tokenizer:
    """Bytes as tokens, and each mark of the template as one."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(sorted({*re.findall(r"<\|?[\w|]+\|?>", source), *SPECIAL.values()}))
    return made


def test_named_templates_are_the_published_ones() -> None:
    for name, theirs in NAMED.items():
        assert asked_for(Template(name=name)) == published(theirs)  # type: ignore[arg-type]
    assert asked_for(Template(name="chatml")) == CHATML
    assert asked_for(Template(chat_template="x")) == "x"
    assert asked_for(Template()) is None


@pytest.mark.parametrize("name", [*FAMILIES, "chatml"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_is_learnt_follows_what_a_server_renders(name: str, system: str | None) -> None:
    own = CHATML if name == "chatml" else published(name)
    system = None if name == "gemma" else system
    template = ChatTemplate.of(own, None, system, SPECIAL)
    row = conversation("who are you?", "I am Harbour.", "and now?", "Still Harbour.")
    text, [(start, end)] = render_row(row, template.renderer(), "lastTurn")
    prompt = _served(template.source, row["messages"][:-1])
    assert text[:start] == prompt
    assert "Still Harbour." in text[start:end]
    assert system is None or system in prompt
    tokenizer = _tokenizer(own)
    alone, whole = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    assert whole[: len(alone)] == alone


def test_a_family_that_asks_for_answers_otherwise_than_it_writes_them_is_refused() -> None:
    template = ChatTemplate.of(published("deepseekv3"), None, None, SPECIAL)
    with pytest.raises(Fault, match="cannot be learnt as they will be asked for"):
        render_row(conversation("q", "a", "r", "b"), template.renderer(), "lastTurn")


@pytest.mark.parametrize(("thinking", "asked", "ends"), [
    (None, {}, "assistant\n"),
    (False, {}, "</think>\n\n"),
    (True, {}, "assistant\n"),
    (False, {"enable_thinking": True}, "assistant\n"),
    (None, {"enable_thinking": False}, "</think>\n\n"),
])  # fmt: skip
def test_thinking_is_baked_in_and_a_request_goes_before_it(
    thinking: bool | None, asked: dict[str, bool], ends: str
) -> None:
    template = ChatTemplate.of(published("qwen3"), None, "s", SPECIAL, thinking)
    row = {**conversation("q", "a"), "chat_template_kwargs": asked}
    prompt = _served(template.source, row["messages"][:-1], **asked)
    assert prompt.endswith(ends)
    text, [(start, _)] = render_row(row, template.renderer(), "assistant")
    assert text[:start] == prompt


@pytest.mark.parametrize("known", [True, False])
def test_a_named_template_needs_its_marks_in_the_vocabulary(known: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    from trimtab_trainer.model.tokenizer import stop_ids

    made = _tokenizer(CHATML if known else "")
    loaded = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    template = ChatTemplate.of(None, CHATML, None, SPECIAL)
    if known:
        ends = stop_ids(loaded, template, Template(name="chatml"), [])
        assert loaded.convert_ids_to_tokens(ends) == ["</s>", "<|im_end|>"]
        return
    with pytest.raises(Fault, match=r"template\.name: chatml ends an answer") as caught:
        stop_ids(loaded, template, Template(name="chatml"), [])
    assert "model.newTokens" in caught.value.hint


def test_texts_are_counted(tmp_path: Path) -> None:
    from trimtab_trainer.measuring import measure

    _tokenizer("").save(str(tmp_path / "tokenizer.json"))
    found = measure(["abc", "a" * 1500, "b" * 100], tmp_path, 1000)
    assert (found.texts, found.tokens, found.longest, found.longer) == (3, 1603, 1500, 1)
    assert found.told(3, "delete") == (
        "; 1.6 k tokens, 1500 in the longest row, 33 % are longer than maxLength and will be deleted"
    )
    assert found.told(300, "delete").startswith("; about 160 k tokens")
