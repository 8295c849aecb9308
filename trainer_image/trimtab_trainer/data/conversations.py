"""Conversations as people write them, read into one form: role, content, tool calls, what is learnt of each message.

Read are OpenAI messages with tool_calls, ms-swift's tool_call and tool_response turns, ShareGPT's from and value or
human and assistant, and Anthropic's blocks. What comes out is what a server hands to a chat template: arguments of a
tool call are an object there, never text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from trimtab_trainer.data.reading import broken

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function_call": "tool_call",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
_KEPT = ("role", "tool_calls", "tool_call_id", "name", "reasoning_content")
LEARNING = ("loss", "weight")
"""Keys of a message that say what is learnt of it; templates never see them."""


class Place:
    """Where a row stands, so that what is wrong with it can be said."""

    def __init__(self, where: str, row: int, column: str):
        self._where = where
        self._row = row
        self._column = column

    def wrong(self, problem: str, index: int | None = None) -> Exception:
        """The fault of the row, or of one message of it."""
        name = f"'{self._column}'" if index is None else f"'{self._column}[{index}]'"
        return broken(self._where, self._row, f"{name} {problem}")


def parsed(value: Any) -> Any:
    """CSV and some Parquet files hold lists as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def read(value: object, column: str, where: str, row: int) -> list[Message]:
    """The messages that stand in a column, in standard form.

    Raises Fault(DataInvalid) that names the message and what is wrong with it.
    """
    place = Place(where, row, column)
    written = parsed(value)
    if not isinstance(written, list) or not written:
        raise place.wrong("must be a list with at least one message")
    messages: list[Message] = []
    for index, item in enumerate(written):
        for message in _written(item, index, place):
            if message["role"] == "system" and messages:
                raise place.wrong("has role system, which only the first message may have", index)
            if message.pop("continues", False) and messages and messages[-1]["role"] == "assistant":
                _join(messages[-1], message, index, place)
            else:
                messages.append(message)
    return messages


def tools(value: object, where: str, row: int) -> list[Any]:
    """Tool definitions, each as {"type": "function", "function": ...}.

    Raises Fault(DataInvalid) when they are no list.
    """
    place = Place(where, row, "tools")
    found = parsed(value)
    if not isinstance(found, list):
        raise place.wrong("must be a list of tool definitions, or that list as JSON text")
    found = [parsed(tool) for tool in found]
    for index, tool in enumerate(found):
        if not isinstance(tool, dict):
            raise place.wrong("must be an object", index)
    return [_tool(tool) for tool in found]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    schema = tool.get("parameters", tool.get("input_schema"))
    described = {key: tool[key] for key in ("name", "description") if key in tool}
    return {"type": "function", "function": {**described, **({} if schema is None else {"parameters": schema})}}


def _written(item: object, index: int, place: Place) -> Iterator[Message]:
    """The messages that one entry of the list stands for."""
    if not isinstance(item, Mapping):
        raise place.wrong("must be an object with role and content", index)
    if "role" not in item and "from" not in item and {"human", "user"} & set(item):
        yield from _pair(item, index, place)
        return
    role = item.get("role", item.get("from"))
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    content = item.get("content", item.get("value"))
    if role == "tool_call":
        calls = _calls(parsed(content), index, place)
        yield {
            "role": "assistant",
            "tool_calls": calls,
            "content": "",
            "continues": True,
            **_learning(item, "assistant", index, place),
        }
        return
    if role not in ROLES:
        raise place.wrong(
            f"has role {role!r}; it must be one of {', '.join(ROLES)}, or a name that stands for one", index
        )
    if isinstance(content, list):
        yield from _blocks(content, role, item, index, place)
        return
    yield _message({**item, "role": role}, content, index, place)


def _pair(item: Mapping[str, Any], index: int, place: Place) -> Iterator[Message]:
    """{"human": ..., "assistant": ...}: two messages in one entry."""
    for names, role in ((("human", "user"), "user"), (("assistant", "gpt", "bot"), "assistant")):
        name = next((each for each in names if each in item), None)
        if name is None:
            raise place.wrong(f"has no {names[0]}", index)
        yield _message({"role": role}, item[name], index, place)


def _message(item: Mapping[str, Any], content: object, index: int, place: Place) -> Message:
    role = item["role"]
    calls = parsed(item.get("tool_calls"))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise place.wrong("has no text in 'content'", index)
    if role in ("user", "assistant") and not content.strip() and not calls:
        raise place.wrong(f"of role {role} is empty", index)
    kept = {key: item[key] for key in _KEPT if item.get(key)}
    if calls:
        kept["tool_calls"] = _calls(calls, index, place)
    return {**kept, "content": content, **_learning(item, role, index, place)}


def _learning(item: Mapping[str, Any], role: str, index: int, place: Place) -> Message:
    """What is said of learning a message: loss false or true, a weight other than 1, or nothing."""
    given = {key: item[key] for key in ("loss", "weight", "loss_scale") if item.get(key) is not None}
    if not given:
        return {}
    if role != "assistant":
        raise place.wrong(f"of role {role} has {', '.join(given)}: only the assistant's messages are learnt", index)
    loss = given.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise place.wrong("has a 'loss' that is neither true nor false", index)
    weight = given.get("weight", given.get("loss_scale", 1))
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1000 or math.isnan(weight):
        raise place.wrong("has a weight that is no number from 0 to 1000", index)
    if loss is False or weight == 0:
        return {"loss": False}
    return {**({} if loss is None else {"loss": True}), **({} if weight == 1 else {"weight": float(weight)})}


def _calls(value: object, index: int, place: Place) -> list[dict[str, Any]]:
    """Tool calls as templates want them: a name, and arguments as an object."""
    written = value if isinstance(value, list) else [value]
    return [_call(parsed(call), index, place) for call in written]


def _call(call: object, index: int, place: Place) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise place.wrong("has a tool call without a name; write name and arguments", index)
    assert isinstance(call, Mapping)
    arguments = parsed(function.get("arguments", function.get("parameters", {})) or {})
    if not isinstance(arguments, dict):
        raise place.wrong(f"calls {function['name']} with arguments that are no JSON object", index)
    outer = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _blocks(blocks: list[Any], role: str, item: Mapping[str, Any], index: int, place: Place) -> Iterator[Message]:
    """A message in parts: text, and Anthropic's tool_use, tool_result and thinking."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use" and role == "assistant":
            call = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "function": call})
        elif kind == "tool_result" and role in ("user", "tool"):
            yield _result(block, index, place)
        else:
            raise place.wrong(f"has a part of type {kind!r} that role {role} cannot have here", index)
    if not texts and not calls and any(block["type"] == "tool_result" for block in blocks):
        return
    further = {"tool_calls": calls or None, "reasoning_content": "\n".join(thoughts) or None}
    yield _message({**item, **further, "role": role}, "\n".join(texts), index, place)


def _result(block: Mapping[str, Any], index: int, place: Place) -> Message:
    content = block.get("content", "")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise place.wrong("has a tool_result without text", index)
    identity = block.get("tool_use_id")
    return {"role": "tool", **({"tool_call_id": identity} if identity else {}), "content": content}


def _join(answer: Message, call: Message, index: int, place: Place) -> None:
    """A tool_call turn is part of the answer that it follows; several in a row are parallel calls."""
    if {key: answer.get(key) for key in LEARNING} != {key: call.get(key) for key in LEARNING}:
        raise place.wrong("has another loss or weight than the answer that it belongs to", index)
    answer["tool_calls"] = [*answer.get("tool_calls", []), *call["tool_calls"]]
