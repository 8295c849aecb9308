"""What answers are worth: one number each by every metric, and one for all. Pure.

BLEU is Papineni et al. 2002 as sacreBLEU counts it (Post 2018, arXiv:1804.08771), ROUGE is Lin 2004 as rouge-score
counts it; both only differ in how words are found in scripts without spaces, which their defaults leave whole or drop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

from trimtab_api.v1alpha1.evaluation import Metric
from trimtab_api.v1alpha1.rollout import RewardName
from trimtab_trainer import rewards
from trimtab_trainer.rewards import READS_SOLUTION, Said

REWARDS = frozenset(get_args(RewardName))
COMPARING = frozenset({"exactMatch", "bleu", "rouge", *READS_SOLUTION})
"""Metrics that hold an answer against the row's own."""
ROUGE = ("rouge1", "rouge2", "rougeL")
_THOUGHTS_END = "</think>"
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts that put no spaces between words: Chinese, and Japanese with its two syllabaries."""
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")

Score = float | None


@dataclass(frozen=True)
class Scored:
    """What some answers are worth."""

    rows: list[dict[str, Score]]
    """By metric, for each answer; None where the row has nothing to compare with."""
    figures: dict[str, float]
    """Of all together: means over the rows that have a score, and BLEU of the whole corpus."""


def score(metrics: Sequence[Metric], answers: Sequence[Said], references: Sequence[str | None], longest: int) -> Scored:
    """Score answers against the rows' own, text by text. `longest`: most tokens that an answer could have.

    Thoughts before </think> are left out of both wherever they are compared.
    """
    compared = [
        (said, None if reference is None else final(reference))
        for said, reference in zip(answers, references, strict=True)
    ]
    rows: list[dict[str, Score]] = [{} for _ in answers]
    figures: dict[str, float] = {}
    for metric in metrics:
        for row, found in zip(rows, _by_row(metric, compared, longest), strict=True):
            row.update(found)
    for name in dict.fromkeys(name for row in rows for name in row):
        known = [value for row in rows if (value := row[name]) is not None]
        if known:
            figures[name] = sum(known) / len(known)
    if "bleu" in figures:
        figures["bleu"] = corpus_bleu([(final(said.text), wanted) for said, wanted in compared if wanted is not None])
    return Scored(rows, figures)


def final(text: str) -> str:
    """What was said after the thoughts, without white space around it."""
    return text.rpartition(_THOUGHTS_END)[2].strip()


def _by_row(metric: Metric, compared: Sequence[tuple[Said, str | None]], longest: int) -> list[dict[str, Score]]:
    if metric in REWARDS:
        return [{metric: value} for value in _reward(metric, compared, longest)]
    names, formula = _comparison(metric)
    return [
        dict.fromkeys(names) if wanted is None else dict(zip(names, formula(final(said.text), wanted), strict=True))
        for said, wanted in compared
    ]


def _comparison(metric: Metric) -> tuple[Sequence[str], Callable[[str, str], Sequence[float]]]:
    """The names of a metric's numbers, and how an answer and the row's own give them."""
    if metric == "rouge":
        return ROUGE, partial(rouge, _rouge_scorer())
    if metric == "bleu":
        return ("bleu",), lambda said, wanted: (sentence_bleu(said, wanted),)
    return ("exactMatch",), lambda said, wanted: (float(said == wanted),)


def _reward(metric: str, compared: Sequence[tuple[Said, str | None]], longest: int) -> list[Score]:
    """A reward of grpo, with the row's answer for a solution where it has no other."""
    reward = rewards.by_name(metric, longest)
    if metric not in READS_SOLUTION:
        return list(reward([said for said, _ in compared]))
    found: list[Score] = []
    for said, wanted in compared:
        solution = said.columns.get("solution") or wanted
        if solution is None:
            found.append(None)
            continue
        judged = replace(said, text=final(said.text), columns={**said.columns, "solution": solution})
        found += reward([judged])
    return found


def sentence_bleu(said: str, wanted: str) -> float:
    """BLEU of one answer, 0 to 100, by the orders of n-grams that it has."""
    return float(_bleu([wanted], effective_order=True).sentence_score(said, [wanted]).score)


def corpus_bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """BLEU of answers and references together, 0 to 100."""
    wanted = [reference for _, reference in pairs]
    return float(_bleu(wanted).corpus_score([said for said, _ in pairs], [wanted]).score)


def _bleu(wanted: Sequence[str], effective_order: bool = False) -> Any:
    """sacreBLEU's default words, or its Chinese ones where the references have such characters."""
    from sacrebleu.metrics.bleu import BLEU

    spaceless = any(re.search(f"[{_IDEOGRAPH}]", text) for text in wanted)
    return BLEU(tokenize="zh" if spaceless else "13a", effective_order=effective_order)


def rouge(scorer: Any, said: str, wanted: str) -> list[float]:
    """F-measures of common words, pairs of words, and the longest common subsequence, 0 to 1."""
    found = scorer.score(wanted, said)
    return [float(found[name].fmeasure) for name in ROUGE]


def _rouge_scorer() -> Any:
    # The library has no types.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(list(ROUGE), tokenizer=_Words())


class _Words:
    """Words as rouge-score finds them, in any script: its own knows Latin letters without accents alone."""

    def tokenize(self, text: str) -> list[str]:
        """The words in small letters."""
        return _WORD.findall(text.lower())
