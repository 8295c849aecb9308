"""Preferences: pairs of answers of which the first is better, and answers that are each good or bad.

A pair is given as a conversation with rejected_response or rejected_messages, or as chosen and rejected with or without
a prompt. Its standard row is a row with two more columns: `rejected`, of the same kind as the row's own body, and
`answers_from`, where the two begin to differ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.preference import Kto
from trimtab_trainer.data import conversations
from trimtab_trainer.data.collecting import Needs
from trimtab_trainer.data.conversations import LEARNING, Message, Place, parsed
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.media import see_prompt_alone
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import IMAGES_ALONE, MESSAGES, QUERY, SHAREGPT, Row, see_turns, string
from trimtab_trainer.data.sequences import Count, Shaping, fit, judge, labels, weighed

log = logging.getLogger(__name__)

_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
_PAIR_HINT = (
    "Give the better answer in messages and the other in rejected_response or rejected_messages; "
    "or give chosen and rejected."
)


def pairs_needed() -> Needs:
    """What a method asks of rows that compares two answers."""
    return Needs(answer=True, text_allowed=True, reshape=_from_chosen, shown=IMAGES_ALONE, complete=_pair)


def judgements_needed() -> Needs:
    """What a method asks of rows that learns from single answers, each good or bad; pairs are taken apart."""
    return Needs(answer=True, text_allowed=True, reshape=_from_completion, shown=IMAGES_ALONE, complete=_judgement)


def sides(row: Row) -> list[Row]:
    """Everything of a standard row that is rendered: itself, and the rejected side of a pair."""
    if "rejected" not in row:
        return [row]
    return [row, {**row, "text" if "text" in row else "messages": row["rejected"]}]


# ------------------------------------------------------------ rows


def _from_chosen(raw: Mapping[str, Any], plain: bool, where: str, row: int) -> Mapping[str, Any]:
    """The columns chosen and rejected, with or without a prompt, as those that a format reads."""
    if "chosen" not in raw or "rejected" not in raw:
        return raw
    rest = {name: value for name, value in raw.items() if name not in ("chosen", "rejected")}
    chosen, rejected = _answer(raw["chosen"]), _answer(raw["rejected"])
    if isinstance(chosen, list) and isinstance(rejected, list):
        better = _whole(raw, "chosen", chosen, where, row)
        return {**rest, "messages": better, "rejected_messages": _whole(raw, "rejected", rejected, where, row)}
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise broken(where, row, "'chosen' and 'rejected' must be both texts or both lists of messages")
    if not plain and any(name in raw for name in QUERY):
        return {**rest, "output" if "instruction" in raw else "response": chosen, "rejected_response": rejected}
    prompt = string(raw, "prompt", where, row) if "prompt" in raw else None
    begins = len(prompt) if prompt is not None else _common_words(chosen, rejected)
    before = prompt or ""
    texts = {"text": before + chosen, "rejected_text": before + rejected, "answers_from": begins}
    return {name: value for name, value in rest.items() if name != "prompt"} | texts


def _from_completion(raw: Mapping[str, Any], plain: bool, where: str, row: int) -> Mapping[str, Any]:
    """The columns prompt and completion (or chosen and rejected) as those that a format reads."""
    if "completion" not in raw:
        return _from_chosen(raw, plain, where, row)
    rest = {name: value for name, value in raw.items() if name not in ("prompt", "completion")}
    completion = _answer(raw["completion"])
    if isinstance(completion, list):
        whole = _whole(raw, "completion", completion, where, row)
        answered = len(conversations.read(completion, "completion", where, row))
        return {**rest, "messages": whole, "answers_from": len(whole) - answered}
    if not plain:
        return raw
    prompt = string(raw, "prompt", where, row)
    return {**rest, "text": prompt + string(raw, "completion", where, row), "answers_from": len(prompt)}


def _answer(value: Any) -> Any:
    """A list of messages, also when it is one message, or JSON; anything else as it is."""
    read = parsed(value)
    if isinstance(read, Mapping):
        return [read]
    return read if isinstance(read, list) else value


def _whole(raw: Mapping[str, Any], column: str, answer: list[Any], where: str, row: int) -> list[Message]:
    """The conversation that an answer ends; many data sets repeat the prompt in the answer."""
    messages = conversations.read(answer, column, where, row)
    asked = next((name for name in ("prompt", *MESSAGES, *SHAREGPT) if name in raw), None)
    if asked is None or messages[0]["role"] in ("system", "user"):
        return messages
    prompt = _answer(raw[asked])
    if isinstance(prompt, str):
        return [{"role": "user", "content": string(raw, asked, where, row)}, *messages]
    return [*conversations.read(prompt, asked, where, row), *messages]


def _common_words(one: str, other: str) -> int:
    """Where two texts begin to differ, at the beginning of a word."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return max((i for i in range(1, same + 1) if one[i - 1].isspace()), default=0)


def _pair(raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
    if "text" in standard:
        if "rejected_text" not in raw or "answers_from" not in raw:
            raise broken(where, row, "plain text without an answer to compare with", _PAIR_HINT)
        rejected, since = raw["rejected_text"], raw["answers_from"]
        _see_texts(standard["text"], rejected, since, where, row)
        return {**standard, "rejected": rejected, "answers_from": since}
    other = _rejected(raw, standard["messages"], where, row)
    since = _first_difference(standard["messages"], other, where, row)
    _see_unweighted([*standard["messages"], *other], where, row)
    see_prompt_alone(standard, [*standard["messages"][since:], *other[since:]], where, row)
    return {**standard, "rejected": other, "answers_from": since}


def _see_texts(chosen: str, rejected: str, since: int, where: str, row: int) -> None:
    if not since:
        raise broken(where, row, "'chosen' and 'rejected' have no common beginning", "Give their prompt.")
    if chosen == rejected:
        raise broken(where, row, "both answers are the same")
    if not chosen[since:].strip() or not rejected[since:].strip():
        raise broken(where, row, "one of the two answers is empty")


def _rejected(raw: Mapping[str, Any], chosen: list[Message], where: str, row: int) -> list[Message]:
    if "rejected_messages" in raw:
        column = "rejected_messages"
        messages = conversations.read(raw[column], column, where, row)
        if chosen[0]["role"] == "system" and messages[0]["role"] != "system":
            messages = [chosen[0], *messages]
        see_turns(messages, True, Place(where, row, column))
        return messages
    if "rejected_response" in raw:
        return [*chosen[:-1], {"role": "assistant", "content": string(raw, "rejected_response", where, row)}]
    raise broken(where, row, "has one answer, and nothing to compare it with", _PAIR_HINT)


def _first_difference(chosen: list[Message], rejected: list[Message], where: str, row: int) -> int:
    """The message in which two conversations differ first: it must be an answer in both."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    index = next((i for i, (one, other) in pairs if _said(one) != _said(other)), min(len(chosen), len(rejected)))
    if index == len(chosen) == len(rejected):
        raise broken(where, row, "both answers are the same")
    if index in (len(chosen), len(rejected)):
        raise broken(where, row, "one conversation is the beginning of the other: there are no two answers to compare")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if (role := messages[index]["role"]) != "assistant":
            problem = f"the {name} conversation differs first in message {index}, of role {role}"
            raise broken(where, row, problem, "Give two answers to one and the same prompt.")
    return index


def _said(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in LEARNING}


def _see_unweighted(messages: list[Message], where: str, row: int) -> None:
    for message in messages:
        if "weight" in message:
            raise broken(where, row, "a message has a weight, and preferences compare whole answers", "Remove it.")


def _judgement(raw: Mapping[str, Any], standard: Row, where: str, row: int) -> Row:
    if "label" not in raw:
        if any(name in raw for name in ("rejected_response", "rejected_messages", "rejected_text")):
            return _pair(raw, standard, where, row)
        hint = "Give label: true for a good answer and false for a bad one; or give pairs, which are taken apart."
        raise broken(where, row, "has no 'label'", hint)
    label = _TRUTHS.get(str(raw["label"]).strip().lower())
    if label is None:
        raise broken(where, row, f"'label' is {raw['label']!r}; it must be true (a good answer) or false")
    if "text" not in standard:
        messages = standard["messages"]
        _see_unweighted(messages, where, row)
        # Its own system prompt, when a row brings one, was put before what its columns say.
        since = len(messages) - (len(raw["messages"]) - raw["answers_from"] if "answers_from" in raw else 1)
        see_prompt_alone(standard, messages[since:], where, row)
        return {**standard, "answers_from": since, "label": label}
    if "answers_from" not in raw:
        raise broken(where, row, "plain text does not tell where the answer begins", "Give prompt and completion.")
    return {**standard, "answers_from": raw["answers_from"], "label": label}


# ------------------------------------------------------------ records

Sequence = tuple[list[int], list[float]]
"""Token ids of an answer after its prompt, and the tokens' weights: 0 for what is not learnt."""


class Pairs:
    """Pairs as token ids and labels of both sides; see sequences.Encoder."""

    columns: tuple[str, ...] = ("chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        self._tokenizer = tokenizer
        self._render = render
        self._shaping = Shaping.of(config, ends_document=False, ends_text=True)
        self._count = Count()

    def encode(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """The records of some rows."""
        both = [side for row in rows for side in sides(row)]
        sequences = list(weighed(both, self._tokenizer, self._render, self._shaping, self._count))
        for row, better, other in zip(rows, sequences[::2], sequences[1::2], strict=True):
            self._count.rows += 1
            for chosen, rejected in _fit_both(better, other, self._shaping.of_row(row), self._count):
                self._count.keep(chosen[1])
                self._count.keep(rejected[1])
                parts = (chosen[0], labels(*chosen), rejected[0], labels(*rejected))
                yield dict(zip(self.columns, parts, strict=True))

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        judge(self._count, self._shaping)
        return self._count


def _fit_both(
    chosen: Sequence, rejected: Sequence, shaping: Shaping, count: Count
) -> Iterator[tuple[Sequence, Sequence]]:
    """A pair, both sides cut alike so that they still answer one prompt; nothing when too little would be left."""
    excess = max(len(chosen[0]), len(rejected[0])) - shaping.max_length
    if excess <= 0:
        yield chosen, rejected
        return
    kept = slice(excess, None) if shaping.truncation == "left" else slice(shaping.max_length)
    good, bad = ((ids[kept], counts[kept]) for ids, counts in (chosen, rejected))
    # A cut from the left must not reach the answers: what is lost of them would count as never said.
    reached = shaping.truncation == "left" and any(any(counts[: excess + 1]) for _, counts in (chosen, rejected))
    if shaping.truncation == "delete" or reached or not all(any(counts[1:]) for _, counts in (good, bad)):
        count.deleted += 1
        return
    count.cut += 1
    yield good, bad


class Judgements:
    """Answers with what is thought of them, as token ids and labels; see sequences.Encoder."""

    columns: tuple[str, ...] = ("input_ids", "labels", "label")

    def __init__(self, config: RunConfig, tokenizer: Any, render: Render | None):
        self._tokenizer = tokenizer
        self._render = render
        self._shaping = Shaping.of(config, ends_document=False, ends_text=True)
        self._count = Count()
        self._groups = {True: 0, False: 0}
        self._knobs = config.spec.kto or Kto()

    def encode(self, rows: list[Row]) -> Iterator[dict[str, list[int]]]:
        """The records of some rows; a pair makes two."""
        judged = [(side, row.get("label", not place)) for row in rows for place, side in enumerate(sides(row))]
        sequences = weighed([side for side, _ in judged], self._tokenizer, self._render, self._shaping, self._count)
        for sequence, (row, label) in zip(sequences, judged, strict=True):
            self._count.rows += 1
            for ids, counts in fit(*sequence, self._shaping.of_row(row), self._count):
                if not any(counts[1:]):
                    self._count.deleted += 1
                    continue
                self._count.keep(counts)
                self._groups[label] += 1
                yield {"input_ids": ids, "labels": labels(ids, counts), "label": [int(label)]}

    def conclude(self) -> Count:
        """See sequences.Encoder."""
        judge(self._count, self._shaping)
        self._weigh()
        return self._count

    def _weigh(self) -> None:
        """Say when the two groups do not balance (equation 8 of arXiv:2402.01306)."""
        good, bad = self._groups[True], self._groups[False]
        desirable, undesirable = self._knobs.desirable_weight, self._knobs.undesirable_weight
        if not bad * undesirable <= good * desirable <= bad * undesirable * 4 / 3:
            log.warning(
                "%d good answers of weight %g against %d bad ones of weight %g: the paper wants the products within "
                "1 to 4/3 of each other; see kto.desirableWeight and kto.undesirableWeight",
                good,
                desirable,
                bad,
                undesirable,
            )
