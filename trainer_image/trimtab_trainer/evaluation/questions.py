"""Validation rows as questions: what a server would be asked, and the answer that the row has. Without torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.evaluation import Evaluation
from trimtab_trainer.data.collecting import Collected, rows_of, sample
from trimtab_trainer.data.conversations import LEARNING
from trimtab_trainer.data.masks import Render, render_prompt, render_row
from trimtab_trainer.data.prompts import ANSWER
from trimtab_trainer.data.rows import COLUMNS, Row
from trimtab_trainer.data.seen import Standing, spacious
from trimtab_trainer.endings import Fault
from trimtab_trainer.evaluation.scores import COMPARING

log = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A validation row that is to be answered."""

    row: int
    """Its number among the validation rows, from 1."""
    messages: list[Message]
    """The conversation up to the answer."""
    answer: Message | None
    """The row's own answer; None when it has none, or a bad one."""
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """What the row tells the chat template."""
    solution: str | None = None
    """The row's column of that name, where the method keeps it."""
    shown: dict[str, list[str]] = field(default_factory=dict)
    """Whole names of what the messages show, by column."""


@dataclass(frozen=True)
class Question:
    """The same in tokens."""

    row: int
    prompt: list[int]
    """Token ids, as a server renders them when it asks for the answer; see data.seen for what they show."""
    messages: list[Message]
    tools: list[Any] | None
    reference: str | None
    """The row's answer as the template writes it, without special tokens and what ends it."""
    solution: str | None
    shown: dict[str, list[str]] = field(default_factory=dict)
    """Names of what the messages show, by column: as the row has them, data: URIs without their data."""


def asked(collected: Collected, config: RunConfig) -> Iterator[Asked]:
    """The validation rows that the evaluation is to answer.

    Raises Fault(DataInvalid) for a row that nobody could answer, and when a metric compares with what no row has.
    """
    evaluation, path = config.spec.evaluation, collected.validation
    if evaluation is None or path is None:
        return
    count = collected.validation_rows
    wanted = set(sample(count, min(evaluation.rows or count, count), config.spec.dataset.seed))
    answered = False
    for index, row in enumerate(rows_of(path)):
        if index in wanted:
            found = _asked(row, index + 1)
            answered = answered or found.answer is not None or found.solution is not None
            yield found
    if not answered:
        _see_nothing_compared(evaluation)


def see(collected: Collected, config: RunConfig) -> None:
    """Raise what `asked` raises."""
    for _ in asked(collected, config):
        continue


def _see_nothing_compared(evaluation: Evaluation) -> None:
    comparing = [metric for metric in evaluation.metrics if metric in COMPARING]
    if comparing:
        raise Fault(
            Reason.DATA_INVALID,
            f"evaluation.metrics: {', '.join(comparing)} compares with the row's answer, and no validation row has one",
            "Add the answers, or remove the metric.",
        )


def _asked(row: Row, number: int) -> Asked:
    if "text" in row:
        hint = "Give conversations in dataset.validation, or remove evaluation."
        raise Fault(Reason.DATA_INVALID, f"validation row {number}: plain text asks nothing", hint)
    said = [{key: value for key, value in message.items() if key not in LEARNING} for message in row["messages"]]
    answer = row.get(ANSWER)
    if answer is None and said[-1]["role"] == "assistant":
        answer = said.pop()
    if not said or said[-1]["role"] not in ("user", "tool"):
        raise Fault(
            Reason.DATA_INVALID,
            f"validation row {number}: there is no turn of the user to answer at its end",
            "Correct the row, or remove evaluation.",
        )
    solution = row.get("columns", {}).get("solution")
    return Asked(
        row=number,
        messages=said,
        # A bad example of kto is no answer to compare with.
        answer=None if row.get("label") is False else answer,
        tools=row.get("tools"),
        options=row.get("chat_template_kwargs", {}),
        solution=None if solution is None else str(solution),
        shown={column: row[column] for column in COLUMNS.values() if row.get(column)},
    )


def write(
    collected: Collected,
    config: RunConfig,
    tokenizer: Any,
    render: Render | None,
    stops: Sequence[int],
    into: Path,
    standing: Standing | None = None,
) -> int:
    """Write the questions to a file, one a line; returns how many there are. `standing`: for what rows show.

    Prompts longer than dataset.maxLength lose their beginning with truncation left, and are else left out and counted;
    so are those that show something.
    Raises what `asked` raises, and Fault(DataEmpty) when all are left out.
    """
    limit, left = config.spec.dataset.max_length, config.resolved.truncation == "left"
    count, too_long = 0, 0
    with into.open("w") as stream:
        for each in asked(collected, config):
            if render is None:
                problem = "the validation rows are conversations and the tokenizer has no chat template"
                raise Fault(Reason.CHAT_TEMPLATE_MISSING, problem)
            question = _in_tokens(each, tokenizer, spacious(render, standing) if standing else render, set(stops))
            if standing is not None:
                names = {column: _told(found, collected) for column, found in each.shown.items()}
                question = replace(question, prompt=standing.marked(question.prompt, each.shown), shown=names)
            if len(question.prompt) > limit and not (left and not each.shown):
                too_long += 1
                continue
            whole = asdict(question)
            stream.write(json.dumps({**whole, "prompt": question.prompt[-limit:]}, ensure_ascii=False) + "\n")
            count += 1
    if too_long:
        log.warning("%d validation rows are not answered: their prompts are longer than dataset.maxLength", too_long)
    if not count:
        raise Fault(
            Reason.DATA_EMPTY,
            f"the prompts of all {too_long} validation rows are longer than dataset.maxLength {limit}",
            "Raise dataset.maxLength, or remove evaluation.",
        )
    return count


def _told(names: Sequence[str], collected: Collected) -> list[str]:
    roots = [place for root in collected.roots if (place := root.place) is not None]
    return [
        f"{name[:40]}…" if name.startswith("data:") else _below(name, [root for root in roots if name.startswith(root)])
        for name in names
    ]


def _below(name: str, roots: Sequence[str]) -> str:
    return name.removeprefix(max(roots, key=len, default="")).lstrip("/")


def read(path: Path) -> list[Question]:
    """The questions of a file."""
    with path.open() as stream:
        return [Question(**json.loads(line)) for line in stream]


def _in_tokens(each: Asked, tokenizer: Any, render: Render, stops: set[int]) -> Question:
    prompt, reference = _texts(each, render)
    ids = _ids(tokenizer, reference)
    while ids and ids[-1] in stops:
        ids.pop()
    return Question(
        row=each.row,
        prompt=_ids(tokenizer, prompt),
        messages=each.messages,
        tools=each.tools,
        reference=None if each.answer is None else tokenizer.decode(ids, skip_special_tokens=True).strip(),
        solution=each.solution,
    )


def _texts(each: Asked, render: Render) -> tuple[str, str]:
    """The prompt as a server renders it, and what the template writes for the row's answer."""
    row = {"messages": each.messages, "tools": each.tools, "chat_template_kwargs": each.options, **each.shown}
    if each.answer is None:
        return render_prompt(row, render), ""
    whole, spans = render_row({**row, "messages": [*each.messages, each.answer]}, render, "lastTurn")
    start, end = spans[-1]
    return whole[:start], whole[start:end]


def _ids(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])
