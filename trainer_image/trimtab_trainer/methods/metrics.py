"""What is reported of held-out rows: functions of transformers.EvalPrediction, in the field's own terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Metrics = Callable[[Any], dict[str, float]]
ABSENT = -100.0
"""Fills the places of documents that a query does not have."""


def of_labels(problem_type: str) -> Metrics:
    """For logits [rows, labels] and labels, by transformers' name of the problem."""
    return {
        "single_label_classification": _single,
        "multi_label_classification": _multi,
        "regression": _regression,
    }[problem_type]


def _single(found: Any) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the labels that occur."""
    from sklearn.metrics import f1_score

    said, true = found.predictions.argmax(-1), found.label_ids.reshape(-1)
    return {
        "accuracy": float((said == true).mean()),
        "f1": float(f1_score(true, said, average="macro", zero_division=0)),
    }


def _multi(found: Any) -> dict[str, float]:
    """Rows whose labels are all right, and F1 over all decisions at probability one half."""
    from sklearn.metrics import f1_score

    said, true = found.predictions > 0, found.label_ids > 0.5
    return {
        "accuracy": float((said == true).all(-1).mean()),
        "f1": float(f1_score(true.reshape(-1), said.reshape(-1), zero_division=0)),
    }


def _regression(found: Any) -> dict[str, float]:
    """Mean squared error, the part of the variance that is explained (R²), and Spearman's rank correlation."""
    said = found.predictions.reshape(-1)
    true = found.label_ids.reshape(-1)
    error = float(((said - true) ** 2).mean())
    spread = float(((true - true.mean()) ** 2).mean())
    return {
        "mse": error,
        "r2": 1 - error / spread if spread else 0.0,
        "spearman": spearman(said, true),
    }


def of_rankings(found: Any) -> dict[str, float]:
    """For scores [queries, documents] and relevance of the same shape, ABSENT where a query has no such document.

    With several documents a query: the mean reciprocal rank of the first relevant one, and how often it leads. With
    one: how often the score is on the right side of zero. A tie counts as lost.
    """
    scores, relevance = np.asarray(found.predictions), np.asarray(found.label_ids)
    present = relevance != ABSENT
    several = present.sum(-1) > 1
    if not several.any():
        right = (scores > 0) == (relevance > 0.5)
        return {"accuracy": float(right[present].mean())}
    scores, relevance, present = scores[several], relevance[several], present[several]
    relevant = present & (relevance > 0.5)
    best = np.where(relevant, scores, -np.inf).max(-1, keepdims=True)
    ranks = 1 + (present & ~relevant & (scores >= best)).sum(-1)
    return {"mrr": float((1 / ranks).mean()), "accuracy": float((ranks == 1).mean())}


def of_vectors(found: Any) -> dict[str, float]:
    """For vectors [rows, 2, width] of anchors and positives: each anchor looks for its own among all positives."""
    anchors, others = _directions(found.predictions)
    ranks = []
    for start in range(0, len(anchors), 1024):
        near = anchors[start : start + 1024] @ others.T
        own = near[np.arange(len(near)), start + np.arange(len(near))][:, None]
        # The same text may be the positive of several anchors: none of them is wrong.
        ranks.append(1 + (near > own + 1e-6).sum(-1))
    rank = np.concatenate(ranks)
    return {
        "recall@1": float((rank == 1).mean()),
        "recall@10": float((rank <= 10).mean()),
        "mrr": float((1 / rank).mean()),
    }


def of_pairs(found: Any) -> dict[str, float]:
    """For vectors [rows, 2, width] and scores [rows]: Spearman's rank correlation of cosine and score."""
    one, other = _directions(found.predictions)
    return {"spearman": spearman((one * other).sum(-1), found.label_ids.reshape(-1))}


def spearman(one: Any, other: Any) -> float:
    """Spearman's rank correlation; 0 when one side is constant, where it is not defined."""
    from scipy.stats import spearmanr

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


def _directions(vectors: Any) -> tuple[Any, Any]:
    whole = np.asarray(vectors, dtype=np.float32)
    whole = whole / np.maximum(np.linalg.norm(whole, axis=-1, keepdims=True), 1e-12)
    return whole[:, 0], whole[:, 1]
