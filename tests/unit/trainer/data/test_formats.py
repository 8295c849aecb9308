"""Formats: how people write conversations, and the one form that all of them become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trimtab_api.conditions import Reason
from trimtab_trainer.data.rows import Row, detect, standard
from trimtab_trainer.endings import Fault


def _read(raw: dict[str, Any], needs_answer: bool = True, text_allowed: bool = False) -> Row:
    return standard(raw, detect(raw, "data", 1, needs_answer), needs_answer, "data", 1, text_allowed)


def _turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kiel"}}}
OTHER = {"type": "function", "function": {"name": "tide", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TOLD = [_turn("user", "q"), _turn("assistant", "a")]
CALLED = [
    _turn("user", "q"),
    _turn("assistant", "", tool_calls=[CALL]),
    _turn("tool", "calm"),
    _turn("assistant", "a"),
]


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TOLD),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, TOLD),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, TOLD),
        ({"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, TOLD),
        ({"instruction": "do", "input": "x", "output": "y"}, [_turn("user", "do\nx"), _turn("assistant", "y")]),
        ({"instruction": "do", "input": "", "output": "y"}, [_turn("user", "do"), _turn("assistant", "y")]),
        (
            {"instruction": "do", "output": "y", "system": "s", "history": [["q", "a"]]},
            [_turn("system", "s"), *TOLD, _turn("user", "do"), _turn("assistant", "y")],
        ),
        *[
            ({query: "q", response: "a"}, TOLD)
            for query, response in [
                ("query", "response"),
                ("prompt", "completion"),
                ("question", "answer"),
                ("problem", "solution"),
                ("input", "target"),
                ("instruction", "response"),
            ]
        ],
        ({"system_prompt": "s", "messages": TOLD}, [_turn("system", "s"), *TOLD]),
        ({"system": "s", "messages": [_turn("system", "s"), *TOLD]}, [_turn("system", "s"), *TOLD]),
        ({"system": "s", "conversation": [{"human": "q", "assistant": "a"}]}, [_turn("system", "s"), *TOLD]),
        # OpenAI: arguments are text there, and an object by the time that a template sees them.
        (
            {
                "messages": [
                    _turn("user", "q"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Kiel"}'},
                            }
                        ],
                    },
                    _turn("tool", "calm", tool_call_id="1"),
                    _turn("assistant", "a"),
                ]
            },
            [
                _turn("user", "q"),
                _turn("assistant", "", tool_calls=[{"id": "1", **CALL}]),
                _turn("tool", "calm", tool_call_id="1"),
                _turn("assistant", "a"),
            ],
        ),
        # ms-swift: turns of their own, parallel calls one after the other, content as JSON text.
        (
            {
                "messages": [
                    _turn("user", "q"),
                    _turn("tool_call", '{"name": "weather", "arguments": {"city": "Kiel"}}'),
                    _turn("tool_call", '{"name": "tide", "arguments": {}}'),
                    _turn("tool_response", "calm"),
                    _turn("tool_response", "low"),
                    _turn("assistant", "a"),
                ]
            },
            [
                _turn("user", "q"),
                _turn("assistant", "", tool_calls=[CALL, OTHER]),
                _turn("tool", "calm"),
                _turn("tool", "low"),
                _turn("assistant", "a"),
            ],
        ),
        (
            {
                "messages": [
                    _turn("user", "q"),
                    _turn("assistant", "let me see"),
                    _turn("tool_call", '{"name": "weather", "arguments": "{\\"city\\": \\"Kiel\\"}"}'),
                ]
            },
            [_turn("user", "q"), _turn("assistant", "let me see", tool_calls=[CALL])],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Kiel"}}'},
                    {"from": "observation", "value": "calm"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            CALLED,
        ),
        # Anthropic: blocks.
        (
            {
                "messages": [
                    _turn("user", "q"),
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm"},
                            {"type": "text", "text": "let me see"},
                            {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Kiel"}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "calm"}]},
                            {"type": "text", "text": "well?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                ]
            },
            [
                _turn("user", "q"),
                _turn("assistant", "let me see", tool_calls=[{"id": "1", **CALL}], reasoning_content="hm"),
                _turn("tool", "calm", tool_call_id="1"),
                _turn("user", "well?"),
                _turn("assistant", "a"),
            ],
        ),
        # What is learnt of a message.
        (
            {"messages": [TOLD[0], _turn("assistant", "a", loss=False), TOLD[0], _turn("assistant", "b", loss=True)]},
            [TOLD[0], _turn("assistant", "a", loss=False), TOLD[0], _turn("assistant", "b", loss=True)],
        ),
        (
            {"messages": [TOLD[0], _turn("assistant", "a", weight=0), TOLD[0], _turn("assistant", "b", loss_scale=2)]},
            [TOLD[0], _turn("assistant", "a", loss=False), TOLD[0], _turn("assistant", "b", weight=2.0)],
        ),
        ({"messages": [TOLD[0], _turn("assistant", "a", weight=1, loss=None)]}, TOLD),
    ],
)
def test_conversations_of_every_kind_become_one_form(raw: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert _read(raw) == {"messages": messages}
    as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in raw.items()}
    assert _read(as_text) == {"messages": messages}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"name": "weather", "input_schema": TOOL["function"]["parameters"]}],  # type: ignore[index]
    ],
)
def test_tools_of_every_kind_become_one_form(tools: object) -> None:
    assert _read({"messages": TOLD, "tools": tools}) == {"messages": TOLD, "tools": [TOOL]}


def test_arguments_for_the_template_travel_with_the_row() -> None:
    row = _read({"query": "q", "response": "a", "chat_template_kwargs": '{"enable_thinking": false}'})
    assert row == {"messages": TOLD, "chat_template_kwargs": {"enable_thinking": False}}


def test_answers_without_a_question_are_text_where_text_will_do() -> None:
    raw = {"messages": [_turn("assistant", "I love music")]}
    assert _read(raw, needs_answer=False, text_allowed=True) == {"text": "I love music"}
    assert _read({"query": "q"}, needs_answer=False) == {"messages": TOLD[:1]}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"conversations": [{"from": "human", "value": "q"}]}, "'conversations' ends with role user"),
        ({"conversations": [{"from": "robot", "value": "q"}]}, "'conversations[0]' has role 'robot'"),
        ({"conversation": [{"human": "q"}]}, "'conversation[0]' has no assistant"),
        ({"instruction": "do", "output": ""}, "'output' is empty"),
        ({"instruction": "do", "input": 3, "output": "x"}, "'input' must be text"),
        ({"system": "s", "messages": [_turn("system", "t"), *TOLD]}, "two different system prompts"),
        ({"messages": [*TOLD, _turn("system", "t"), TOLD[1]]}, "'messages[2]' has role system"),
        ({"messages": [TOLD[0], _turn("tool_call", "weather")]}, "'messages[1]' has a tool call without a name"),
        (
            {"messages": [TOLD[0], _turn("tool_call", '{"name": "weather", "arguments": "Kiel"}')]},
            "calls weather with arguments that are no JSON object",
        ),
        ({"messages": [TOLD[0], {"role": "assistant", "content": [{"type": "image"}]}]}, "a part of type 'image'"),
        ({"messages": TOLD, "tools": "weather"}, "'tools' must be a list"),
        ({"messages": TOLD, "tools": ["weather"]}, "'tools[0]' must be an object"),
        ({"messages": TOLD, "chat_template_kwargs": ["x"]}, "must be an object whose keys are names"),
        ({"messages": TOLD, "chat_template_kwargs": {"tools": []}}, "cannot set tools"),
        ({"messages": [_turn("user", "q", loss=True), TOLD[1]]}, "'messages[0]' of role user has loss"),
        ({"messages": [TOLD[0], _turn("assistant", "a", loss="no")]}, "'loss' that is neither true nor false"),
        ({"messages": [TOLD[0], _turn("assistant", "a", weight=-1)]}, "a weight that is no number from 0 to 1000"),
        ({"messages": [TOLD[0], _turn("assistant", "a", weight=True)]}, "a weight that is no number from 0 to 1000"),
        (
            {"messages": [TOLD[0], _turn("assistant", "a", loss=False), _turn("tool_call", '{"name": "x"}')]},
            "has another loss or weight than the answer that it belongs to",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_row(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(Fault) as caught:
        _read(raw)
    assert caught.value.reason is Reason.DATA_INVALID
    assert caught.value.message.startswith("data row 1: ")
    assert said in caught.value.message
    assert caught.value.hint
