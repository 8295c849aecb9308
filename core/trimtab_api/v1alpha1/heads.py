"""The knobs of the methods whose models answer with numbers: one block a method, named after it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import LIST_SET, Model, Rule, rules


class RewardModel(Model):
    """A scalar reward learnt from pairs of answers (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155)."""

    center_rewards_coefficient: Annotated[float | None, Field(gt=0, le=100)] = None
    """Weight of the squared sum of both rewards, which keeps them around zero (Eisenstein et al. 2023, arXiv:2312.09244: 0.01). By default nothing does."""


class Classification(Model):
    """Labels for whole conversations or texts."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.problemType == 'regression' || has(self.numLabels) || has(self.labels)",
                "give numLabels, or labels by name, unless problemType is regression",
                field_path=".numLabels",
            ),
            Rule(
                "!has(self.numLabels) || !has(self.labels) || self.numLabels == self.labels.size()",
                "must be the number of labels, or left out",
                field_path=".numLabels",
            ),
            Rule(
                "self.problemType != 'singleLabel' || !has(self.numLabels) || self.numLabels > 1",
                "must be at least 2 with singleLabel; for one yes or no choose multiLabel",
                field_path=".numLabels",
            ),
            Rule(
                "self.problemType != 'singleLabel' || !has(self.labels) || self.labels.size() > 1",
                "must be at least 2 with singleLabel; for one yes or no choose multiLabel",
                field_path=".labels",
            ),
        )
    )

    num_labels: Annotated[int | None, Field(ge=1, le=10_000)] = None
    """How many labels there are, or numbers with regression. By default the number of labels, and 1 with regression."""
    labels: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]] | None,
        Field(min_length=1, max_length=1000, json_schema_extra=LIST_SET),
    ] = None
    """Names of the labels in order, which rows may use in place of numbers; the model carries them as id2label."""
    problem_type: Literal["singleLabel", "multiLabel", "regression"] = "singleLabel"
    """singleLabel: one label of several, by cross-entropy. multiLabel: any number of them, by binary cross-entropy of each. regression: real numbers, by squared error."""

    @property
    def size(self) -> int:
        """Outputs of the head."""
        return self.num_labels or len(self.labels or ("value",))


class Embedding(Model):
    """Vectors of texts that lie close when the texts belong together."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.loss == 'infonce' || !has(self.hardNegatives)",
                "leave it out: only infonce holds an anchor against several texts at once",
                field_path=".hardNegatives",
            ),
            Rule(
                "self.loss == 'infonce' || !has(self.temperature)",
                "leave it out: only infonce has one",
                field_path=".temperature",
            ),
            Rule(
                "self.loss in ['contrastive', 'onlineContrastive'] || !has(self.margin)",
                "leave it out, or set loss: contrastive or onlineContrastive",
                field_path=".margin",
            ),
        )
    )

    loss: Literal["infonce", "cosineSimilarity", "contrastive", "onlineContrastive"] = "infonce"
    """infonce: each anchor's positive against all other texts of the batch (arXiv:1807.03748). cosineSimilarity: the cosine nears the row's score. contrastive: pairs are drawn together or pushed apart up to a margin; onlineContrastive does so with a batch's hardest pairs."""
    temperature: Annotated[float | None, Field(gt=0, le=10)] = None
    """What infonce divides cosines by; lower looks harder at the nearest texts. By default 0.1."""
    margin: Annotated[float | None, Field(gt=0, le=2)] = None
    """How far apart, in cosine distance, contrastive losses push what does not belong together. By default 0.5."""
    hard_negatives: Annotated[int | None, Field(ge=0, le=64)] = None
    """Use the first so many of each row's negatives. By default all."""
    pooling: Literal["lastToken", "mean", "cls"] = "lastToken"
    """What becomes the vector: the last token's state (causal models), the mean of all, or the first token's (encoders)."""
    normalize: bool = True
    """Scale vectors to length 1."""
    matryoshka_dims: Annotated[
        list[Annotated[int, Field(ge=1, le=65536)]] | None,
        Field(min_length=1, max_length=16, json_schema_extra=LIST_SET),
    ] = None
    """Sizes that the vector's beginning is trained to be useful at (arXiv:2205.13147); the whole vector always is."""
    instruction: Annotated[str | None, Field(min_length=1, max_length=4096)] = None
    """Text before each anchor, as it stands; the model carries it as the prompt named query."""


class Reranker(Model):
    """A score for how well a document answers a query, from reading both together."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.loss == 'listwise' || !has(self.temperature)",
                "leave it out, or set loss: listwise",
                field_path=".temperature",
            ),
        )
    )

    loss: Literal["pointwise", "listwise"] = "pointwise"
    """pointwise: each document by itself, by binary cross-entropy. listwise: a query's positive against its negatives, by cross-entropy over them."""
    temperature: Annotated[float | None, Field(gt=0, le=10)] = None
    """What listwise divides scores by. By default 1."""
    max_negatives: Annotated[int, Field(ge=1, le=64)] = 7
    """Use at most the first so many of each row's negatives."""
