"""Which weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    LIST_ATOMIC,
    Model,
    Rule,
    rules,
)

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Lora(Model):
    """A low-rank adapter on the linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.targetRegex) || !has(self.targetModules)",
                "leave it out when targetModules is given",
                field_path=".targetRegex",
            )
        )
    )

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Width r of the two factors. The adapter's size grows linearly with it; servers accept 8, 16, 32, 64, 128, 256, 320, 512 and round up to them."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32
    """Scale: the update is multiplied by alpha/rank, or alpha/sqrt(rank) with rsLora."""
    dropout: Fraction = 0.05
    """Dropout before the first factor."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]] | None,
        Field(min_length=1, max_length=64, json_schema_extra=LIST_ATOMIC),
    ] = None
    """Names of the modules to adapt, or all-linear, which is the default."""
    target_regex: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """A regular expression over full module names in place of targetModules."""
    rs_lora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapter (Liu et al. 2024, arXiv:2402.09353). Engines cannot serve it unmerged: merge it first."""
    modules_to_save: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=16, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Modules that are trained in full and saved with the adapter, for example embed_tokens and lm_head. Engines cannot serve it unmerged: merge it first."""
    init_weights: Literal["default", "gaussian"] = "default"
    """How the factors start."""


class Tuner(Model):
    """Which weights move."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.type) || self.type != 'full' || !has(self.lora)",
                "remove it, or set type: lora: full tuning has no adapter",
                field_path=".lora",
            )
        )
    )

    type: Literal["full", "lora"] | None = None
    """full moves every weight, lora trains an adapter. By default lora, and full for a model from scratch."""
    lora: Lora | None = None
    """The adapter, when type is lora."""
