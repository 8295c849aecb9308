"""What a method's model answers with: tokens, numbers or a vector. Without torch, for who must know beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.heads import Classification, Embedding
from trimtab_api.v1alpha1.status import ArtifactKind, TaskType


@dataclass(frozen=True)
class LanguageHead:
    """A language model: the next token."""

    task: TaskType = "CAUSAL_LM"
    kind: ArtifactKind = "model"

    def document(self) -> dict[str, Any]:
        """What args.json says of it, beside the task."""
        return {}


@dataclass(frozen=True)
class ScalarHead:
    """A linear layer on the last token: one number or several."""

    size: int
    """Outputs."""
    names: tuple[str, ...] = ()
    """Names of the outputs, when they have some."""
    problem_type: str | None = None
    """transformers' name of the loss; None where a method brings its own."""
    task: TaskType = "SEQ_CLS"
    kind: ArtifactKind = "classifier"

    def document(self) -> dict[str, Any]:
        """See LanguageHead."""
        return {"numLabels": self.size, "labels": list(self.names) or None, "problemType": self.problem_type}


@dataclass(frozen=True)
class VectorHead:
    """The backbone alone, its states pooled into one vector."""

    settings: Embedding = field(default_factory=Embedding)
    task: TaskType = "FEATURE_EXTRACTION"
    kind: ArtifactKind = "embedder"

    def document(self) -> dict[str, Any]:
        """See LanguageHead."""
        kept = ("pooling", "normalize", "instruction", "matryoshkaDims")
        return {key: value for key, value in self.settings.dump().items() if key in kept}


Head = LanguageHead | ScalarHead | VectorHead

_PROBLEMS = {
    "singleLabel": "single_label_classification",
    "multiLabel": "multi_label_classification",
    "regression": "regression",
}


def head_of(spec: FineTuneJobSpec) -> Head:
    """What the model of a job answers with."""
    if spec.method in ("rewardModel", "reranker"):
        return ScalarHead(1)
    if spec.method == "sequenceClassification":
        asked = classification(spec)
        return ScalarHead(asked.size, tuple(asked.labels or ()), _PROBLEMS[asked.problem_type])
    return VectorHead(embedding(spec)) if spec.method == "embedding" else LanguageHead()


def classification(spec: FineTuneJobSpec) -> Classification:
    """The block; the rules see to it that a classifier has one."""
    assert spec.classification is not None, "the rules ask for it"
    return spec.classification


def embedding(spec: FineTuneJobSpec) -> Embedding:
    """The block, or the defaults."""
    return spec.embedding or Embedding()
