"""What a sound row is: three formats, told by their columns, made into two standard forms.

A standard row is {"text": ...} or {"messages": [...], "tools"?: [...]}: nothing after this room knows of formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from trimtab_trainer.data.reading import broken

Row = dict[str, Any]
Format = Literal["messages", "queryResponse", "text"]

ROLES = ("system", "user", "assistant", "tool")
_COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "queryResponse": ("query", "response"),
    "text": ("text",),
}


def detect(columns: Mapping[str, Any], where: str, row: int) -> Format:
    """The format of a row by its columns. Raises Fault(DataInvalid) when none fits."""
    for name, needed in _COLUMNS.items():
        if all(column in columns for column in needed):
            return name
    raise broken(
        where,
        row,
        f"columns {', '.join(sorted(columns)) or '(none)'} fit no format",
        "Give messages, query and response, or text; or map names with dataset.train[].columns.",
    )


def standard(raw: Mapping[str, Any], form: Format, needs_answer: bool, where: str, row: int) -> Row:
    """The standard form of a row.

    Raises Fault(DataInvalid) that says what is wrong with it. `needs_answer`: a conversation must end with one.
    """
    readers: dict[Format, Callable[[Mapping[str, Any], bool, str, int], Row]] = {
        "text": _text,
        "messages": _messages,
        "queryResponse": _query_response,
    }
    return readers[form](raw, needs_answer, where, row)


def _text(raw: Mapping[str, Any], _needs_answer: bool, where: str, row: int) -> Row:
    return {"text": _string(raw, "text", where, row)}


def _query_response(raw: Mapping[str, Any], _needs_answer: bool, where: str, row: int) -> Row:
    messages: list[dict[str, str]] = []
    if raw.get("system"):
        messages.append({"role": "system", "content": _string(raw, "system", where, row)})
    for turn, pair in enumerate(_history(raw, where, row)):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise broken(where, row, f"'history[{turn}]' must be a pair of texts, a query and its response")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": _string(raw, "query", where, row)})
    messages.append({"role": "assistant", "content": _string(raw, "response", where, row)})
    return {"messages": messages}


def _history(raw: Mapping[str, Any], where: str, row: int) -> list[Any]:
    history = _parsed(raw.get("history") or [])
    if not isinstance(history, list):
        raise broken(where, row, "'history' must be a list of pairs")
    return history


def _messages(raw: Mapping[str, Any], needs_answer: bool, where: str, row: int) -> Row:
    messages = _parsed(raw.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise broken(where, row, "'messages' must be a list with at least one message")
    checked = [_message(message, index, where, row) for index, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in checked):
        raise broken(where, row, "'messages' has no message of role user")
    if needs_answer and checked[-1]["role"] != "assistant":
        last = checked[-1]["role"]
        raise broken(where, row, f"'messages' ends with role {last}; the last message must be the assistant's answer")
    standard_row: Row = {"messages": checked}
    if raw.get("tools"):
        tools = _parsed(raw["tools"])
        if not isinstance(tools, list):
            raise broken(where, row, "'tools' must be a list of tool definitions")
        standard_row["tools"] = tools
    return standard_row


def _message(message: object, index: int, where: str, row: int) -> dict[str, Any]:
    name = f"'messages[{index}]'"
    if not isinstance(message, dict):
        raise broken(where, row, f"{name} must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise broken(where, row, f"{name} has role {role!r}; it must be one of {', '.join(ROLES)}")
    if role == "system" and index > 0:
        raise broken(where, row, f"{name} has role system, which only the first message may have")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise broken(where, row, f"{name} has no text in 'content'")
    if role in ("user", "assistant") and not content.strip() and not message.get("tool_calls"):
        raise broken(where, row, f"{name} of role {role} is empty")
    kept = {
        key: value for key, value in message.items() if key in ("role", "tool_calls", "tool_call_id", "name") and value
    }
    return {**kept, "content": content}


def _string(raw: Mapping[str, Any], column: str, where: str, row: int) -> str:
    value = raw.get(column)
    if not isinstance(value, str):
        raise broken(where, row, f"'{column}' must be text")
    if not value.strip():
        raise broken(where, row, f"'{column}' is empty")
    return value


def _parsed(value: Any) -> Any:
    """CSV and some Parquet files hold lists as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
