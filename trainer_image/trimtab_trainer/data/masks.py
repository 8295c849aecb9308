"""Which characters of a rendered conversation are learnt: the assistant's answers, found by rendering its beginnings.

No template is asked for marks. The text before an answer is what a server will render when it asks for that answer, so
it must be a prefix of the whole; a template that rewrites earlier turns is found out and refused, not trained wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jinja2

from trimtab_api.conditions import Reason
from trimtab_trainer.data.rows import Row
from trimtab_trainer.endings import Fault

Loss = Literal["all", "assistant", "lastTurn"]
Span = tuple[int, int]
Render = Callable[..., str]


def render_row(row: Row, render: Render | None, loss: Loss) -> tuple[str, list[Span]]:
    """The text of a standard row and the spans of it that are learnt.

    Raises Fault(DataInvalid) when the template refuses the row, Fault(SpecInvalid) when it rewrites earlier turns.
    """
    if "text" in row:
        text = str(row["text"])
        return text, [(0, len(text))]
    assert render is not None, "conversations need a template; the preflight and the loader see to it"
    messages, tools = row["messages"], row.get("tools")
    try:
        whole = render(messages, tools=tools)
        if loss == "all":
            return whole, [(0, len(whole))]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if loss == "lastTurn" else answers
        return whole, [_span(messages, index, tools, whole, render) for index in wanted]
    except jinja2.TemplateError as error:
        raise Fault(
            Reason.DATA_INVALID,
            f"the chat template refuses a conversation that begins {_beginning(messages)}: {error}",
            "Correct the row, or set template.chatTemplate.",
        ) from error


def _span(messages: list[dict[str, Any]], index: int, tools: list[Any] | None, whole: str, render: Render) -> Span:
    before = render(messages[:index], tools=tools, add_generation_prompt=True) if index else ""
    through = whole if index == len(messages) - 1 else render(messages[: index + 1], tools=tools)
    if not (whole.startswith(before) and whole.startswith(through)):
        raise Fault(
            Reason.SPEC_INVALID,
            "the chat template writes earlier turns differently when later ones follow, so their answers cannot be "
            f"learnt as they will be asked for (conversation that begins {_beginning(messages)})",
            "Set dataset.loss: lastTurn, or template.chatTemplate to one that leaves earlier turns alone.",
        )
    # White space after the end-of-turn token belongs to the template: the model never gets to say it.
    end = len(through.rstrip()) if through.rstrip() != before.rstrip() else len(through)
    return len(before), max(end, len(before))


def learnt(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its place in the text, whether it lies within a span. One that straddles a start does not."""
    marks: list[bool] = []
    position = 0
    for start, end in offsets:
        while position < len(spans) and start >= spans[position][1]:
            position += 1
        marks.append(position < len(spans) and spans[position][0] <= start < end <= spans[position][1])
    return marks


def _beginning(messages: list[dict[str, Any]]) -> str:
    return repr(str(messages[0].get("content"))[:40])
