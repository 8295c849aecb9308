"""Evaluation by generation: the tuned model answers the validation rows, and its answers are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import LIST_ATOMIC, Model, Rule, rules
from trimtab_api.v1alpha1.rollout import RewardName

Metric = Literal["exactMatch", "bleu", "rouge", RewardName]
"""What an answer can be scored by: against the row's own answer, or by a reward that grpo knows by name."""

DEFAULT_METRICS: tuple[Metric, ...] = ("exactMatch",)


class Generate(Model):
    """How answers are drawn."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.topP) || self.topP == 1.0 || (has(self.temperature) && self.temperature > 0.0)",
                "leave it out, or raise temperature: at temperature 0 the likeliest token is taken, and none is drawn",
                field_path=".topP",
            )
        )
    )

    max_new_tokens: Annotated[int, Field(ge=1, le=131072)] = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0
    """Softmax temperature of the sampling; 0 always takes the likeliest token, so that the same weights give the same answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1
    """Sample from the likeliest tokens that together have this probability."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of the sampling. With temperature above 0 answers also depend on batchSize and on the number of processes."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Prompts that a process answers at once. Lowered with training.perDeviceBatchSize when memory has run out."""


class Evaluation(Model):
    """After the training the model answers the validation rows; answers and scores go to object storage."""

    generate: Generate = Field(default_factory=Generate)
    """How answers are drawn."""
    metrics: Annotated[list[Metric], Field(max_length=16, json_schema_extra=LIST_ATOMIC)] = Field(
        default_factory=lambda: list(DEFAULT_METRICS)
    )
    """What answers are scored by; none at all leaves the answers alone. exactMatch: 1 when the answer is the row's own, else 0. bleu: of all answers together, 0 to 100 (sacreBLEU). rouge: the F-measures ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1. The others are the rewards of that name under grpo; accuracy and cosine compare with the row's column solution where the method keeps it, else with the row's own answer."""
    rows: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Answer this many validation rows, drawn with dataset.seed. By default all of them."""
    at_start: bool = False
    """Also evaluate before the first step, for comparison."""
