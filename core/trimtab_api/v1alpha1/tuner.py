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
from trimtab_api.v1alpha1.source import ModelSource

Fraction = Annotated[float, Field(ge=0, lt=1)]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


class Lora(Model):
    """A low-rank adapter on the linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.targetRegex) || !has(self.targetModules)",
                "leave it out when targetModules is given",
                field_path=".targetRegex",
            ),
            Rule(
                "!has(self.targetParameters) || !has(self.dropout) || self.dropout == 0.0",
                "must be 0, or left out: parameters that are no layer of their own take no dropout",
                field_path=".dropout",
            ),
            Rule(
                "!has(self.targetParameters) || !self.dora",
                "must be false with targetParameters: only whole layers have a direction and a size",
                field_path=".dora",
            ),
            Rule(
                "self.initWeights in ['default', 'gaussian'] || !self.dora",
                "must be false, or set initWeights to default or gaussian: a weight that was taken apart has no size",
                field_path=".dora",
            ),
            Rule(
                "self.initWeights in ['default', 'gaussian'] || !has(self.targetParameters)",
                "must be default or gaussian with targetParameters: only the weights of whole layers are taken apart",
                field_path=".initWeights",
            ),
            Rule(
                "self.initWeights in ['default', 'gaussian'] || self.rank <= 256",
                "must be at most 256, or set initWeights to default: these starts are published with twice the rank",
                field_path=".rank",
            ),
        )
    )

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Width r of the two factors. The adapter's size grows linearly with it; servers accept 8, 16, 32, 64, 128, 256, 320, 512 and round up to them."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32
    """Scale: the update is multiplied by alpha/rank, or alpha/sqrt(rank) with rsLora."""
    dropout: Fraction | None = None
    """Dropout before the first factor. By default 0.05, and 0 for a mixture of experts or with targetParameters. Methods that learn from preferences switch it off: noise would drown the small difference of two answers."""
    target_modules: Annotated[
        list[ModuleName] | None,
        Field(min_length=1, max_length=64, json_schema_extra=LIST_ATOMIC),
    ] = None
    """Names of the modules to adapt, or all-linear, which is the default: every linear layer but the head and the routers of experts."""
    target_regex: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """A regular expression over full module names in place of targetModules."""
    target_parameters: Annotated[
        list[ModuleName] | None,
        Field(min_length=1, max_length=64, json_schema_extra=LIST_ATOMIC),
    ] = None
    """Names of parameters to adapt beside the modules, where experts share one tensor: mlp.experts.gate_up_proj, for example."""
    rs_lora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapter (Liu et al. 2024, arXiv:2402.09353). Engines cannot serve it unmerged: merge it first."""
    modules_to_save: Annotated[
        list[ModuleName],
        Field(max_length=16, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Modules that are trained in full and saved with the adapter; embeddings and head stand for the model's own. Engines cannot serve it unmerged: merge it first."""
    bias: Literal["none", "all", "loraOnly"] = "none"
    """Which biases of the base move as well. Engines cannot serve it unmerged: merge it first."""
    init_weights: Annotated[
        str,
        Field(max_length=16, pattern=r"^(default|gaussian|pissa|pissa_niter_([1-9]|[1-5][0-9]|6[0-4])|olora)$"),
    ] = "default"
    """How the factors start: default and gaussian change nothing at first; pissa takes the largest singular values out of the base (pissa_niter_N finds them approximately, in seconds), olora the first columns of a QR decomposition. Those are published as a plain adapter on the unchanged base, of twice the rank."""
    lora_plus_ratio: Annotated[float | None, Field(ge=1, le=1024)] = None
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the second factor's learning rate over the first's; 16 is the paper's."""


class Freeze(Model):
    """What stays as it is under full tuning."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.layers) || !has(self.ratio)",
                "leave it out when layers is given",
                field_path=".ratio",
            )
        )
    )

    embeddings: bool = False
    """The embeddings, and with them a head that shares their matrix."""
    layers: Annotated[int | None, Field(ge=1, le=1024)] = None
    """The first so many blocks."""
    ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    """The first so large a part of the blocks."""
    regex: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """Every parameter whose full name the expression matches from its beginning."""
    trainable_regex: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """Parameters that move although they are named above; alone, the only ones that move."""


class LowerAdapter(Model):
    """An adapter that the base takes in before the new one is trained."""

    from_: Annotated[ModelSource, Field(alias="from")]
    """Where it is."""


class Tuner(Model):
    """Which weights move."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.type) || self.type != 'full' || !has(self.lora)",
                "remove it, or set type: lora: full tuning has no adapter",
                field_path=".lora",
            ),
            Rule(
                "!has(self.freeze) || (has(self.type) && self.type == 'full')",
                "remove it, or set type: full: beside an adapter the whole base is frozen",
                field_path=".freeze",
            ),
            Rule(
                "!has(self.continueFrom) || !has(self.type) || self.type != 'full'",
                "remove it, or set type: lora: full tuning has no adapter",
                field_path=".continueFrom",
            ),
            Rule(
                "!has(self.continueFrom) || !has(self.lora)",
                "remove it: an adapter that goes on keeps its own rank, scale and modules",
                field_path=".lora",
            ),
            Rule(
                "!has(self.adapters) || !has(self.type) || self.type != 'full'",
                "remove it, or set type: lora: to tune the sum in full, merge the adapters first",
                field_path=".adapters",
            ),
            Rule(
                "!has(self.adapters) || !has(self.continueFrom)",
                "remove one of adapters and continueFrom: a new adapter stands on others, or an old one goes on",
                field_path=".adapters",
            ),
        )
    )

    type: Literal["full", "lora"] | None = None
    """full moves every weight, lora trains an adapter. By default lora, and full for a model from scratch."""
    lora: Lora | None = None
    """The adapter, when type is lora."""
    freeze: Freeze | None = None
    """What stays as it is, when type is full."""
    continue_from: ModelSource | None = None
    """The adapter whose training goes on, its weights without its optimiser. It was trained on the very base of this job."""
    adapters: Annotated[list[LowerAdapter] | None, Field(min_length=1, max_length=4, json_schema_extra=LIST_ATOMIC)] = (
        None
    )
    """Adapters that the base takes in first; the new one learns on top of them. All of them are published as one adapter on the base itself, whose rank is the sum of theirs."""
