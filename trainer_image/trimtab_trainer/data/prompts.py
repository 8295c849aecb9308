"""Prompts: conversations that somebody is about to answer, with whatever a reward wants to know of them.

A row ends with the user's turn; an answer that follows it is set aside (gkd learns from it). Every other column is kept
and given to the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import RunConfig
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.masks import Render, render_prompt, render_row
from trimtab_trainer.data.media import see_prompt_alone
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import KINDS, Kind, Row, shows
from trimtab_trainer.data.sequences import Count, Truncation
from trimtab_trainer.endings import Fault

PROMPT, ANSWER, ROW = "prompt", "answer", "row"
"""Columns of a record: token ids of the prompt and of the row's own answer, and the rest as UTF-8 bytes of JSON."""
_CONVERSATION = {
    *("messages", "conversations", "conversation", "tools", "history", "system", "chat_template_kwargs"),
    *KINDS,
    *(f"{kind}s" for kind in KINDS),
}
"""Columns that make the conversation; a reward gets it as such."""


def needed(*columns: str, answer: bool = False, shown: tuple[Kind, ...] = ()) -> Needs:
    """Rows with a prompt and these further columns; `answer`: also with an answer to it.

    `shown`: what the prompt may show.
    """

    def complete(raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
        for column in columns:
            if raw.get(column) is None:
                raise broken(where, row, f"'{column}' is not there, and a reward of this job reads it")
        messages = standard["messages"]
        answered = messages[-1]["role"] == "assistant"
        prompt = messages[:-1] if answered else messages
        if not prompt or prompt[-1]["role"] not in ("user", "tool"):
            raise broken(where, row, "there is no turn of the user to answer at its end")
        see_prompt_alone(standard, messages[len(prompt) :], where, row)
        known = {name: value for name, value in raw.items() if name in columns or name not in _CONVERSATION}
        return {
            **standard,
            "messages": prompt,
            **({ANSWER: messages[-1]} if answered else {}),
            "place": f"{where} row {row}",
            "columns": json.loads(json.dumps(known, default=str)),
        }

    return Needs(answer=answer, text_allowed=False, shown=shown, complete=complete)


@dataclass(frozen=True)
class Asked:
    """What a record keeps of its row beside the tokens."""

    messages: list[dict[str, Any]]
    """The prompt."""
    columns: dict[str, Any]
    """The row's other columns."""
    place: str
    """How a person finds the row: source and number."""


def read_row(record: Mapping[str, Any]) -> Asked:
    """What stands in a record's column ROW."""
    return Asked(**json.loads(bytes(record[ROW])))


def _written(row: Row) -> list[int]:
    known = {"messages": row["messages"], "columns": row["columns"], "place": row["place"]}
    return list(json.dumps(known, ensure_ascii=False, sort_keys=True).encode())


class Prompts:
    """Rows as prompts of token ids, with their own answers; see sequences.Encoder."""

    columns: tuple[str, ...] = (PROMPT, ANSWER, ROW)

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        assert render is not None, "prompts are conversations, and those have a template"
        self._tokenizer = tokenizer
        self._render = render
        self._truncation: Truncation = config.resolved.truncation
        self._limit = config.spec.dataset.max_length
        self._count = Count()

    def encode(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """The records of some rows."""
        for row in rows:
            self._count.rows += 1
            text, answer = self._texts(row)
            prompt = self._fit(self._ids(text), row)
            if prompt is None:
                self._count.deleted += 1
                continue
            ids = self._ids(answer)
            self._count.sequences += 1
            self._count.tokens += len(prompt) + len(ids)
            self._count.learnt += len(ids)
            yield {PROMPT: prompt, ANSWER: ids, ROW: _written(row)}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        if not self._count.sequences:
            raise Fault(
                Reason.DATA_EMPTY,
                f"all {self._count.rows} prompts are longer than dataset.maxLength {self._limit} and were deleted",
                "Raise dataset.maxLength, or set dataset.truncation to left.",
            )
        return self._count

    def _texts(self, row: Row) -> tuple[str, str]:
        """The prompt as a server renders it when it asks for an answer, and the row's own answer up to its end."""
        if ANSWER in row:
            whole, spans = render_row({**row, "messages": [*row["messages"], row[ANSWER]]}, self._render, "lastTurn")
            start, end = spans[-1]
            return whole[:start], whole[start:end]
        return render_prompt(row, self._render), ""

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        found = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return list(found)

    def _fit(self, prompt: list[int], row: Row) -> list[int] | None:
        if len(prompt) <= self._limit:
            return prompt
        if self._truncation != "left" or shows(row):
            return None
        self._count.cut += 1
        return prompt[-self._limit :]
