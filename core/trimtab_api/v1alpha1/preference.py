"""The knobs of the methods that learn from preferences: one block a method, named after it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab_api.schema import LIST_ATOMIC, Model
from trimtab_api.v1alpha1.source import ModelSource

Weight = Annotated[float, Field(ge=0, le=1000)]
Beta = Annotated[float, Field(gt=0, le=1000)]

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exoPair",
    "ncaPair",
    "robust",
    "bcoPair",
    "sppoHard",
    "aot",
    "aotUnpaired",
    "apoZero",
    "apoDown",
    "discopop",
    "sft",
    "sigmoidNorm",
]
"""What a pair is charged."""


class Dpo(Model):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Beta = 0.1
    """How strongly the model is held to its reference: higher moves less. With ipo it is the paper's tau."""
    loss_type: Annotated[list[DpoLoss], Field(min_length=1, max_length=8, json_schema_extra=LIST_ATOMIC)] = Field(
        default=["sigmoid"]
    )
    """What a pair is charged; several are added up. sigmoid is the paper's; [sigmoid, bcoPair, sft] is MPO (arXiv:2411.10442)."""
    loss_weights: Annotated[list[Weight] | None, Field(min_length=1, max_length=8, json_schema_extra=LIST_ATOMIC)] = (
        None
    )
    """Factor of each loss, in the order of lossType. By default 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = 0
    """Share of pairs whose order is believed to be wrong. Only robust, exoPair, aot and aotUnpaired take it."""
    rpo_alpha: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Adds this much of the chosen answer's own loss (arXiv:2404.19733), which keeps its probability from falling. By default nothing."""
    ld_alpha: Annotated[float | None, Field(ge=0, le=1)] = None
    """Weight of the tokens by which an answer is longer than the other (LD-DPO, arXiv:2409.06411): 0 leaves them out. By default they count in full."""
    ref_model: ModelSource | None = None
    """The reference, of the same vocabulary. By default the model as it was before this job; an adapter's is its base, which costs no memory."""
    precompute_ref_log_probs: bool = False
    """Ask the reference once before the training instead of at each step: full tuning then holds one model, not two."""


class Kto(Model):
    """Optimisation against a reference point, from answers that are each good or bad (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    beta: Beta = 0.1
    """How strongly the model is held to its reference: higher moves less."""
    desirable_weight: Weight = 1
    """Weight of the good answers. With unequal groups keep weight times count of the two within 1 to 4/3 of each other."""
    undesirable_weight: Weight = 1
    """Weight of the bad answers."""


class Cpo(Model):
    """Contrastive preference optimisation, without a reference (Xu et al. 2024, arXiv:2401.08417)."""

    beta: Beta = 0.1
    """Steepness of the comparison of the answers' log-probabilities."""
    alpha: Weight = 1
    """How much of the chosen answer's own loss is added."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """What the difference is charged: sigmoid is the paper's, hinge SLiC's (arXiv:2305.10425), ipo squares the distance of the mean per token from 1/(2 beta)."""


class Simpo(Model):
    """Simple preference optimisation, without a reference: mean log-probability per token as the reward (Meng et al. 2024, arXiv:2405.14734)."""

    beta: Beta = 2
    """Scale of the reward."""
    gamma: Annotated[float, Field(ge=0, le=1000)] = 1
    """Margin by which the chosen answer's reward shall exceed the rejected one's. Think of gamma/beta: the paper's best are 0.3 to 0.6."""
    cpo_alpha: Weight = 0
    """How much of the chosen answer's own loss is added, as CPO does; 0 is the paper's SimPO."""


class Orpo(Model):
    """Odds-ratio preference optimisation, without a reference: instruction tuning and preference in one (Hong et al. 2024, arXiv:2403.07691)."""

    lambda_: Annotated[float, Field(alias="lambda", ge=0, le=1000)] = 0.1
    """Weight of the odds ratio beside the chosen answer's own loss."""
