"""What is kept of an evaluation: predictions.jsonl, one row a line, and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab_api.v1alpha1.evaluation import Evaluation
from trimtab_trainer.evaluation.questions import Question
from trimtab_trainer.evaluation.scores import Score, Scored
from trimtab_trainer.rewards import Said

ANSWERS, METRICS = "predictions.jsonl", "metrics.json"


@dataclass(frozen=True)
class Prediction:
    """A question with the model's answer."""

    question: Question
    text: str
    """Without special tokens, and without the token that ended it."""
    ids: Sequence[int]
    """Its tokens, the one that ended it included."""
    finish: Literal["stop", "length"]
    """Whether it ended by itself or was cut off."""

    def said(self) -> Said:
        """The answer as rewards are asked about it."""
        columns = {} if self.question.solution is None else {"solution": self.question.solution}
        return Said(self.question.messages, self.text, self.ids, columns, place=f"validation row {self.question.row}")

    def line(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """One line of predictions.jsonl."""
        asked = self.question
        return {
            "row": asked.row,
            "messages": asked.messages,
            **asked.shown,
            **({"tools": asked.tools} if asked.tools else {}),
            "reference": asked.reference,
            "completion": self.text,
            "finishReason": self.finish,
            "tokens": len(self.ids),
            "scores": dict(scores),
        }


def prediction(question: Question, ids: Sequence[int], tokenizer: Any, stops: Sequence[int]) -> Prediction:
    """From the tokens of an answer to its text."""
    ended = bool(ids) and ids[-1] in stops
    text = tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True).strip()
    return Prediction(question, text, ids, "stop" if ended else "length")


def figures(found: Sequence[Prediction], scored: Scored) -> dict[str, float]:
    """The metrics, the mean length of an answer in tokens, and the share of answers that ended by themselves."""
    return {
        **scored.figures,
        "answerTokens": sum(len(each.ids) for each in found) / len(found),
        "answersEnded": sum(each.finish == "stop" for each in found) / len(found),
    }


def write(found: Sequence[Prediction], scored: Scored, asked: Evaluation, step: int, folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ANSWERS).open("w") as stream:
        for each, scores in zip(found, scored.rows, strict=True):
            stream.write(json.dumps(each.line(scores), ensure_ascii=False) + "\n")
    summary = {"step": step, "rows": len(found), "metrics": figures(found, scored), "evaluation": asked.dump()}
    (folder / METRICS).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
