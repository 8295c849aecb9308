"""What a sound row is: five formats, told by their columns, made into two standard forms.

A standard row is {"text": ...} or {"messages": [...], "tools"?: [...], "chat_template_kwargs"?: {...}}: nothing after
this room knows of formats. A message of the assistant may hold "loss" and "weight": what is learnt of it. What messages
show stands beside them, in the columns images, videos and audios.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from trimtab_trainer.data import conversations
from trimtab_trainer.data.conversations import Message, Place, parsed
from trimtab_trainer.data.reading import broken

Row = dict[str, Any]
Format = Literal["messages", "queryResponse", "alpaca", "sharegpt", "text"]

MESSAGES = ("messages",)
SHAREGPT = ("conversations", "conversation")
SYSTEM = ("system", "system_prompt")
QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
)
"""Names under which a column is found, the first that is there."""
Kind = Literal["image", "video", "audio"]
"""What a message may show beside text."""
KINDS: tuple[Kind, ...] = get_args(Kind)
IMAGES_ALONE: tuple[Kind, ...] = ("image",)
"""What methods look at that were proved on images and on nothing else."""
IMAGES = "images"
COLUMNS: dict[Kind, str] = {"image": IMAGES, "video": "videos", "audio": "audios"}
"""Columns of a standard row with the whole names of what its messages show."""
TAGS: dict[Kind, str] = {kind: f"<{kind}>" for kind in KINDS}
"""Where a message's text shows it."""
_ALPACA = ("instruction", "output")
_OURS = {"messages", "tools", "documents", "add_generation_prompt"}
"""What a template is always given; a row cannot replace it."""


def detect(columns: Mapping[str, Any], where: str, row: int, needs_answer: bool = True) -> Format:
    """The format of a row by its columns. Raises Fault(DataInvalid) when none fits."""
    if _name(columns, MESSAGES):
        return "messages"
    if _name(columns, SHAREGPT):
        return "sharegpt"
    if all(name in columns for name in _ALPACA):
        return "alpaca"
    query, response = _name(columns, QUERY), _name(columns, RESPONSE)
    if query and (response or not needs_answer):
        return "queryResponse"
    if "text" in columns:
        return "text"
    raise broken(
        where,
        row,
        f"columns {', '.join(sorted(columns)) or '(none)'} fit no format",
        "Give messages, conversations, instruction and output, query and response, or text; "
        "or map names with dataset.train[].columns.",
    )


def standard(
    raw: Mapping[str, Any], form: Format, needs_answer: bool, where: str, row: int, text_allowed: bool = False
) -> Row:
    """The standard form of a row.

    Raises Fault(DataInvalid) that says what is wrong with it. `needs_answer`: a conversation must end with one.
    `text_allowed`: answers without any question are plain text.
    """
    if form == "text":
        return {"text": string(raw, "text", where, row)}
    readers: dict[Format, Callable[[Mapping[str, Any], bool, str, int], list[Message]]] = {
        "messages": _messages,
        "sharegpt": _sharegpt,
        "queryResponse": _query_response,
        "alpaca": _alpaca,
    }
    messages = _with_system(readers[form](raw, needs_answer, where, row), raw, where, row)
    if text_allowed and all(message["role"] == "assistant" and message["content"] for message in messages):
        return {"text": "\n".join(message["content"] for message in messages)}
    see_turns(messages, needs_answer, Place(where, row, _name(raw, (*MESSAGES, *SHAREGPT)) or "messages"))
    found: Row = {"messages": messages}
    if raw.get("tools"):
        found["tools"] = conversations.tools(raw["tools"], where, row)
    if raw.get("chat_template_kwargs"):
        found["chat_template_kwargs"] = _template_arguments(raw["chat_template_kwargs"], where, row)
    return found


def _messages(raw: Mapping[str, Any], _needs_answer: bool, where: str, row: int) -> list[Message]:
    return conversations.read(raw.get("messages"), "messages", where, row)


def _sharegpt(raw: Mapping[str, Any], _needs_answer: bool, where: str, row: int) -> list[Message]:
    name = _name(raw, SHAREGPT) or SHAREGPT[0]
    return conversations.read(raw.get(name), name, where, row)


def _query_response(raw: Mapping[str, Any], needs_answer: bool, where: str, row: int) -> list[Message]:
    question = string(raw, _name(raw, QUERY) or QUERY[0], where, row)
    messages = [*_history(raw, where, row), {"role": "user", "content": question}]
    response = _name(raw, RESPONSE)
    if response is None and not needs_answer:
        return messages
    return [*messages, {"role": "assistant", "content": string(raw, response or RESPONSE[0], where, row)}]


def _alpaca(raw: Mapping[str, Any], _needs_answer: bool, where: str, row: int) -> list[Message]:
    question = string(raw, "instruction", where, row)
    if raw.get("input"):
        question += "\n" + string(raw, "input", where, row)
    answer = {"role": "assistant", "content": string(raw, "output", where, row)}
    return [*_history(raw, where, row), {"role": "user", "content": question}, answer]


def _history(raw: Mapping[str, Any], where: str, row: int) -> list[Message]:
    history = parsed(raw.get("history") or [])
    if not isinstance(history, list):
        raise broken(where, row, "'history' must be a list of pairs")
    messages: list[Message] = []
    for turn, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise broken(where, row, f"'history[{turn}]' must be a pair of texts, a query and its response")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _with_system(messages: list[Message], raw: Mapping[str, Any], where: str, row: int) -> list[Message]:
    """The messages after the row's own system prompt."""
    name = _name(raw, SYSTEM)
    if name is None or not raw[name]:
        return messages
    system = string(raw, name, where, row)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise broken(where, row, f"'{name}' and the first message are two different system prompts")
    return messages


def see_turns(messages: list[Message], needs_answer: bool, place: Place) -> None:
    """Raise Fault(DataInvalid) when nobody asks, or, with `needs_answer`, when nobody answers in the end."""
    if not any(message["role"] == "user" for message in messages):
        raise place.wrong("has no message of role user")
    if needs_answer and messages[-1]["role"] != "assistant":
        last = messages[-1]["role"]
        raise place.wrong(f"ends with role {last}; the last message must be the assistant's answer")


def _template_arguments(value: object, where: str, row: int) -> dict[str, Any]:
    found = parsed(value)
    if not isinstance(found, dict) or not all(isinstance(key, str) and key.isidentifier() for key in found):
        raise broken(where, row, "'chat_template_kwargs' must be an object whose keys are names")
    if taken := sorted(_OURS & set(found)):
        raise broken(where, row, f"'chat_template_kwargs' cannot set {', '.join(taken)}: those are the row's own")
    return found


def _name(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in raw), None)


def string(raw: Mapping[str, Any], column: str, where: str, row: int) -> str:
    """The text of a column. Raises Fault(DataInvalid) when it is none, or empty."""
    value = raw.get(column)
    if not isinstance(value, str):
        raise broken(where, row, f"'{column}' must be text")
    if not value.strip():
        raise broken(where, row, f"'{column}' is empty")
    return value


def shown(row: Mapping[str, Any]) -> Iterator[tuple[Kind, str]]:
    """What a standard row shows: kind and whole name."""
    return ((kind, name) for kind, column in COLUMNS.items() for name in row.get(column, []))


def shows(row: Mapping[str, Any]) -> bool:
    """Whether a standard row shows anything."""
    return any(row.get(column) for column in COLUMNS.values())


def names_of(row: Mapping[str, Any]) -> dict[Kind, Iterator[str]]:
    """The names of what a standard row shows, of each kind that it shows."""
    return {kind: iter(row[column]) for kind, column in COLUMNS.items() if row.get(column)}


def parts_of(text: str, names: Mapping[Kind, Iterator[str]]) -> list[dict[str, str]]:
    """A message's text as the parts that templates of models with senses take; `names` of what comes next.

    A tag of a kind that is not among them is text.
    """
    kinds = {TAGS[kind]: kind for kind in names}
    parts: list[dict[str, str]] = []
    for piece in re.split("(" + "|".join(map(re.escape, kinds)) + ")", text):
        if piece in kinds:
            kind = kinds[piece]
            parts.append({"type": kind, kind: next(names[kind], "")})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
