"""Which characters of a rendered conversation are learnt, and how much: found by rendering its beginnings.

No template is asked for marks. The text before an answer is what a server will render when it asks for that answer, so
it must be a prefix of the whole; a template that rewrites earlier turns is found out and refused, not trained wrongly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jinja2

from trimtab_api.conditions import Reason
from trimtab_trainer.data.conversations import LEARNING
from trimtab_trainer.data.rows import Row, names_of, parts_of
from trimtab_trainer.endings import Fault

Loss = Literal["all", "assistant", "lastTurn", "lastRound"]
Span = tuple[int, int]
Render = Callable[..., str]

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
"""What a template writes where an answer was not thought about."""


class Part(NamedTuple):
    """Characters from start to end, whose losses count `weight` times."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Learning:
    """What is learnt of conversations, beside what their messages say themselves."""

    loss: Loss
    tool_call_weight: float = 1.0
    """Weight of tool calls within answers."""
    ignore_empty_think: bool = False
    """Leave out the empty thoughts that an answer begins with."""


def render_row(row: Row, render: Render | None, loss: Loss) -> tuple[str, list[Span]]:
    """The text of a standard row and the spans of it that are learnt.

    Raises Fault(DataInvalid) when the template refuses the row, Fault(SpecInvalid) when it rewrites earlier turns.
    """
    text, parts = render_parts(row, render, Learning(loss))
    return text, [(part.start, part.end) for part in parts if part.weight]


def render_parts(row: Row, render: Render | None, learning: Learning) -> tuple[str, list[Part]]:
    """The text of a standard row and its weighted parts, in order; what is in none is not learnt.

    A row's `answers_from` is the message (in plain text, the character) before which nothing is learnt.
    Raises what render_row raises.
    """
    if "text" in row:
        text = str(row["text"])
        return text, [Part(row.get("answers_from", 0), len(text))]
    assert render is not None, "conversations need a template; the preflight and the loader see to it"
    spoken = _Conversation(row, render)
    try:
        if learning.loss == "all":
            return spoken.whole, _around(spoken, learning)
        since = row.get("answers_from", 0)
        wanted = [index for index in _wanted(row["messages"], learning.loss) if index >= since]
        return spoken.whole, [part for index in wanted for part in _answer(spoken, index, learning)]
    except jinja2.TemplateError as error:
        raise _refused(row, error) from error


def render_prompt(row: Row, render: Render) -> str:
    """The text of a standard row as a server renders it when it asks for the next answer.

    Raises Fault(DataInvalid) when the template refuses the row.
    """
    try:
        return _Conversation(row, render).before(len(row["messages"]))
    except jinja2.TemplateError as error:
        raise _refused(row, error) from error


def _refused(row: Row, error: jinja2.TemplateError) -> Fault:
    return Fault(
        Reason.DATA_INVALID,
        f"the chat template refuses a conversation that begins {_beginning(row['messages'])}: {error}",
        "Correct the row, or set template.chatTemplate.",
    )


class _Conversation:
    """A row as the template sees it."""

    def __init__(self, row: Row, render: Render):
        self.said = row["messages"]
        self._shown = [{key: value for key, value in each.items() if key not in LEARNING} for each in self.said]
        if names := names_of(row):
            self._shown = [{**each, "content": parts_of(each["content"], names)} for each in self._shown]
        self._render = render
        self._options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        self._whole: str | None = None

    @property
    def whole(self) -> str:
        """The text of all messages."""
        if self._whole is None:
            self._whole = self._render(self._shown, **self._options)
        return self._whole

    def before(self, index: int) -> str:
        """What a server renders when it asks for message `index`."""
        return self._render(self._shown[:index], add_generation_prompt=True, **self._options) if index else ""

    def through(self, index: int) -> str:
        """The text up to the end of message `index`."""
        if index == len(self._shown) - 1:
            return self.whole
        return self._render(self._shown[: index + 1], **self._options)

    def without_calls(self, index: int) -> str:
        """The same with the tool calls of that message left out."""
        said = {key: value for key, value in self._shown[index].items() if key != "tool_calls"}
        return self._render([*self._shown[:index], said], **self._options)


def _wanted(messages: list[dict[str, Any]], loss: Loss) -> list[int]:
    """The answers that are learnt; what a message says of itself goes before what the spec says of all."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    first = {"assistant": 0, "lastTurn": answers[-1] if answers else 0, "lastRound": asked}[loss]
    return [index for index in answers if messages[index].get("loss", index >= first)]


def _around(spoken: _Conversation, learning: Learning) -> list[Part]:
    """Everything, but for answers of which something else is said."""
    parts, done = [], 0
    for index, message in enumerate(spoken.said):
        calls = "tool_calls" in message and learning.tool_call_weight != 1
        marked = message.get("loss") is False or "weight" in message
        if message["role"] != "assistant" or not (calls or marked or learning.ignore_empty_think):
            continue
        start, end = _span(spoken, index)
        parts.append(Part(done, start))
        parts += [] if message.get("loss") is False else _answer(spoken, index, learning)
        done = end
    return [part for part in [*parts, Part(done, len(spoken.whole))] if part.start < part.end]


def _answer(spoken: _Conversation, index: int, learning: Learning) -> list[Part]:
    """The parts of one answer."""
    message = spoken.said[index]
    weight = float(message.get("weight", 1))
    start, end = _span(spoken, index)
    if learning.ignore_empty_think and (empty := EMPTY_THINK.match(spoken.whole, start, end)):
        start = empty.end()
    if not message.get("tool_calls") or learning.tool_call_weight == 1:
        return [Part(start, end, weight)]
    first, last = _calls(spoken, index, start, end)
    parts = (
        Part(start, first, weight),
        Part(first, last, weight * learning.tool_call_weight),
        Part(last, end, weight),
    )
    return [part for part in parts if part.start < part.end and part.weight]


def _calls(spoken: _Conversation, index: int, start: int, end: int) -> Span:
    """Where the tool calls of an answer stand: between what it begins and ends with when it has none."""
    answer, plain = spoken.whole[start:end], spoken.without_calls(index)[start:].rstrip()
    ends = _common(answer[::-1], plain[::-1])
    begins = _common(answer[: len(answer) - ends], plain[: len(plain) - ends])
    return start + begins, end - ends


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _span(spoken: _Conversation, index: int) -> Span:
    whole, before, through = spoken.whole, spoken.before(index), spoken.through(index)
    if not (whole.startswith(before) and whole.startswith(through)):
        raise Fault(
            Reason.SPEC_INVALID,
            "the chat template writes earlier turns differently when later ones follow, so their answers cannot be "
            f"learnt as they will be asked for (conversation that begins {_beginning(spoken.said)})",
            "Set dataset.loss: lastTurn, or lastRound where a template changes nothing after the last question; "
            "or template.chatTemplate to one that leaves earlier turns alone.",
        )
    # White space after the end-of-turn token belongs to the template: the model never gets to say it.
    end = len(through.rstrip()) if through.rstrip() != before.rstrip() else len(through)
    return len(before), max(end, len(before))


def learnt(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its place in the text, whether it lies within a span. One that straddles a start does not."""
    return [weight > 0 for weight in weights(offsets, [Part(*span) for span in spans])]


def weights(offsets: Sequence[Span], parts: Sequence[Part]) -> list[float]:
    """For each token, by its place in the text, the weight of the part that it begins in; 0 outside.

    A token that reaches out of what is learnt is not; between two parts side by side it may reach.
    """
    reaches = [part.end for part in parts]
    for index in reversed(range(len(parts) - 1)):
        if parts[index].end == parts[index + 1].start:
            reaches[index] = reaches[index + 1]
    found: list[float] = []
    position = 0
    for start, end in offsets:
        while position < len(parts) and start >= parts[position].end:
            position += 1
        inside = position < len(parts) and parts[position].start <= start < end <= reaches[position]
        found.append(parts[position].weight if inside else 0.0)
    return found


def _beginning(messages: list[dict[str, Any]]) -> str:
    return repr(str(messages[0].get("content"))[:40])
