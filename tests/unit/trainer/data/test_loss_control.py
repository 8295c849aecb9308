"""What is learnt of a conversation and how much: by message, by round, for tool calls, for empty thoughts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.trainer.conftest import conversation
from trimtab_trainer.data.masks import Learning, Part, Render, render_parts, weights
from trimtab_trainer.data.sequences import IGNORED, Language, Shaping
from trimtab_trainer.template import CHATML, ChatTemplate


def _published(name: str) -> str:
    """A family's own template, as TRL carries it to know it by."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()


def _render(source: str) -> Render:
    return ChatTemplate.of(source, None, None, {"bos_token": "<s>", "eos_token": "</s>"}).renderer()


CHAT, QWEN, QWEN3 = _render(CHATML), _render(_published("qwen2_5")), _render(_published("qwen3"))


def _said(row: dict[str, Any], render: Render, **learning: Any) -> list[tuple[str, float]]:
    text, parts = render_parts(row, render, Learning(**{"loss": "assistant", **learning}))
    return [(text[part.start : part.end], part.weight) for part in parts]


def _marked(**marks: Any) -> dict[str, Any]:
    row = conversation("q", "first", "r", "second")
    row["messages"][1] |= marks
    return row


@pytest.mark.parametrize(
    ("marks", "loss", "wanted"),
    [
        ({}, "assistant", [("first<|im_end|>", 1), ("second<|im_end|>", 1)]),
        ({"loss": False}, "assistant", [("second<|im_end|>", 1)]),
        ({"loss": True}, "lastTurn", [("first<|im_end|>", 1), ("second<|im_end|>", 1)]),
        ({"weight": 3.0}, "assistant", [("first<|im_end|>", 3), ("second<|im_end|>", 1)]),
        ({"weight": 3.0}, "lastTurn", [("second<|im_end|>", 1)]),
    ],
)
def test_a_message_says_itself_what_is_learnt_of_it(
    marks: dict[str, Any], loss: str, wanted: list[tuple[str, float]]
) -> None:
    assert _said(_marked(**marks), CHAT, loss=loss) == wanted


def test_all_but_what_a_message_says() -> None:
    text, _ = render_parts(_marked(), CHAT, Learning("all"))
    assert _said(_marked(), CHAT, loss="all") == [(text, 1)]
    before, _, after = text.partition("first<|im_end|>")
    assert _said(_marked(loss=False), CHAT, loss="all") == [(before, 1), (after, 1)]
    assert _said(_marked(weight=0.5), CHAT, loss="all") == [(before, 1), ("first<|im_end|>", 0.5), (after, 1)]


def _call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": "Kiel"}}}


def _agent(content: str = "") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "an earlier answer"},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": content, "tool_calls": [_call("weather"), _call("tide")]},
            {"role": "tool", "content": "calm"},
            {"role": "assistant", "content": "It is calm."},
        ]
    }


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_tool_calls_have_a_weight_of_their_own(content: str) -> None:
    row = _agent(content)
    plain = _said(row, QWEN)
    said = _said(row, QWEN, tool_call_weight=2)
    called = next(text for text, weight in said if weight == 2)
    assert called.strip().startswith("<tool_call>")
    assert called.endswith("</tool_call>")
    assert "".join(text for text, _ in said) == "".join(text for text, _ in plain)
    assert content in said[1][0]
    left_out = _said(row, QWEN, tool_call_weight=0)
    assert "tool_call" not in "".join(text for text, _ in left_out)
    assert "It is calm." in left_out[-1][0]


def test_the_last_round_is_what_follows_the_last_question() -> None:
    said = [text for text, _ in _said(_agent(), QWEN, loss="lastRound")]
    assert len(said) == 2
    assert "weather" in said[0]
    assert said[1] == "It is calm.<|im_end|>"


def test_thoughts_are_learnt_and_empty_ones_are_not() -> None:
    row = conversation("q", "a")
    assert _said(row, QWEN3) == [("<think>\n\n</think>\n\na<|im_end|>", 1)]
    assert _said(row, QWEN3, ignore_empty_think=True) == [("a<|im_end|>", 1)]
    thought = {**row, "messages": [row["messages"][0], {**row["messages"][1], "reasoning_content": "hm"}]}
    assert _said(thought, QWEN3, ignore_empty_think=True) == [("<think>\nhm\n</think>\n\na<|im_end|>", 1)]
    asked_for_none = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    assert _said(asked_for_none, QWEN3) == [("a<|im_end|>", 1)]


def test_a_token_takes_the_weight_of_where_it_begins() -> None:
    parts = [Part(2, 4, 1.0), Part(4, 6, 3.0)]
    assert weights([(0, 2), (2, 5), (5, 6), (6, 7)], parts) == [0, 1, 3, 0]
    assert weights([(1, 3), (3, 4), (4, 7)], parts) == [0, 1, 0]


class Letters:
    """A tokenizer whose tokens are the letters."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts]}
        offsets = [[(index, index + 1) for index in range(len(text))] for text in texts]
        return {"input_ids": [[ord(letter) for letter in text] for text in texts], "offset_mapping": offsets}


def test_weights_stand_beside_labels_only_where_they_are_needed() -> None:
    shaping = Shaping("assistant", "delete", 1000, ends_document=False)
    plain, heavy = Language(Letters(), CHAT, shaping).encode([_marked(), _marked(weight=2.0)])
    assert plain["weights"] == []
    learnt = [(chr(int(label)), count) for label, count in zip(heavy["labels"], heavy["weights"], strict=True) if count]
    assert learnt == [*((letter, 2) for letter in "first<|im_end|>"), *((letter, 1) for letter in "second<|im_end|>")]
    assert heavy["labels"] == plain["labels"]
    assert IGNORED in heavy["labels"]


def test_the_weighted_loss_is_the_published_sum() -> None:
    """ms-swift's loss_scale: each token's cross entropy times its weight, over the number of learnt tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from trimtab_trainer.methods.causal import CausalTrainer, Collator

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
    add_fused_lm_head(model)
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "weights": [0, 2.5, 1, 0, 0.5]},
        {"input_ids": [6, 7, 8], "labels": [-100, 7, 8], "weights": []},
    ]
    batch = Collator(0)(rows)
    alone: Any = SimpleNamespace(aux_loss_enabled=False, args=SimpleNamespace(average_tokens_across_devices=False))

    def ours(inputs: dict[str, Any]) -> float:
        loss = CausalTrainer.compute_loss(alone, model, dict(inputs), num_items_in_batch=torch.tensor(5))
        return float(loss.detach())

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    expected = (each * batch["weights"][:, 1:].flatten()).sum() / 5
    assert ours(batch) == pytest.approx(float(expected.detach()), abs=1e-5)
    plain = {name: tensor for name, tensor in batch.items() if name != "weights"}
    assert ours(plain) == pytest.approx(float(each.detach().sum() / 5), abs=1e-5)
    assert abs(ours(batch) - ours(plain)) > 1e-2
    assert "weights" not in Collator(0)([{**row, "weights": []} for row in rows])
