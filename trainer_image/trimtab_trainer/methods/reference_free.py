"""Preferences without a reference: CPO, SimPO and ORPO are three losses over the same log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid, relu
from trl.trainer import dpo_trainer

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.preference import Cpo, Orpo, Simpo
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.paired import PairTrainer, pair_arguments, pair_parts
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.reference import COPY


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds some answers."""

    total: torch.Tensor
    """Sum of the log-probabilities of each answer's tokens: (pairs,)."""
    tokens: torch.Tensor
    """Number of them: (pairs,)."""

    @property
    def mean(self) -> torch.Tensor:
        """Mean log-probability of a token: (pairs,)."""
        return self.total / self.tokens

    @property
    def loss(self) -> torch.Tensor:
        """Negative log-likelihood per token of all answers together, as in instruction tuning."""
        return -self.total.sum() / self.tokens.sum()


@dataclass(frozen=True)
class Charge:
    """What a batch of pairs is charged, and what it is told by."""

    loss: torch.Tensor
    chosen_rewards: torch.Tensor
    """The implicit rewards: (pairs,)."""
    rejected_rewards: torch.Tensor


Charging = Callable[[Likelihood, Likelihood], Charge]
"""From the chosen and the rejected answers' likelihood."""


def cpo(knobs: Cpo) -> Charging:
    """Equations 3 to 5 of arXiv:2401.08417; the chosen answer's loss is its authors' code's, per token."""

    def charge(chosen: Likelihood, rejected: Likelihood) -> Charge:
        if knobs.loss_type == "ipo":
            compared = (chosen.mean - rejected.mean - 1 / (2 * knobs.beta)) ** 2
        elif knobs.loss_type == "hinge":
            compared = relu(1 - knobs.beta * (chosen.total - rejected.total))
        else:
            compared = -logsigmoid(knobs.beta * (chosen.total - rejected.total))
        return Charge(
            compared.mean() + knobs.alpha * chosen.loss, knobs.beta * chosen.total, knobs.beta * rejected.total
        )

    return charge


def simpo(knobs: Simpo) -> Charging:
    """Equation 6 of arXiv:2405.14734, with CPO's term when it is asked for."""

    def charge(chosen: Likelihood, rejected: Likelihood) -> Charge:
        good, bad = knobs.beta * chosen.mean, knobs.beta * rejected.mean
        loss = -logsigmoid(good - bad - knobs.gamma).mean()
        if knobs.cpo_alpha:
            loss = loss + knobs.cpo_alpha * chosen.loss
        return Charge(loss, good, bad)

    return charge


def orpo(knobs: Orpo) -> Charging:
    """Equations 2 to 7 of arXiv:2403.07691; the probability of an answer is the geometric mean over its tokens."""

    def charge(chosen: Likelihood, rejected: Likelihood) -> Charge:
        ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        loss = chosen.loss - knobs.lambda_ * logsigmoid(ratio).mean()
        return Charge(loss, knobs.lambda_ * chosen.mean, knobs.lambda_ * rejected.mean)

    return charge


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p."""
    # An answer that is certain to the last bit has infinite odds, and a gradient that is no number.
    certain = -torch.finfo(log_probability.dtype).eps
    log_probability = log_probability.clamp(max=certain)
    return log_probability - torch.log(-torch.expm1(log_probability))


class ReferenceFreeTrainer(PairTrainer):
    """DPOTrainer with a loss that asks no reference, and with none in memory."""

    def __init__(self, charging: Charging, **parts: Any):
        with _no_reference():
            super().__init__(**parts)
        if COPY in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(COPY)
        if self.ref_model is not None:
            raise Fault(Reason.ASSERTION_FAILED, "a reference model is in memory, and this method asks none")
        self._charging = charging

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        asked = {name: value for name, value in inputs.items() if name != "completion_mask"}
        if self.aux_loss_enabled:
            asked["output_router_logits"] = True
        outputs = model(**asked, labels=labels, use_cache=False, fused_lm_head=True)
        shown = inputs["completion_mask"][:, 1:]
        total = outputs.log_probs[:, -shown.shape[1] :].sum(dim=1)
        tokens = shown.sum(dim=1).clamp(min=1)
        chosen, rejected = (Likelihood(*each) for each in zip(total.chunk(2), tokens.chunk(2), strict=True))
        charge = self._charging(chosen, rejected)
        self._tell(charge, chosen, rejected)
        loss = charge.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss

    def _tell(self, charge: Charge, chosen: Likelihood, rejected: Likelihood) -> None:
        """One collective and one wait for the device, for all metrics."""
        good, bad = charge.chosen_rewards.detach(), charge.rejected_rewards.detach()
        columns = {
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/margins": good - bad,
            "rewards/accuracies": (good > bad).float(),
            "logps/chosen": chosen.total.detach(),
            "logps/rejected": rejected.total.detach(),
            "nll_loss": chosen.loss.detach().expand_as(good),
        }
        table = self.accelerator.gather(torch.stack([column.float() for column in columns.values()], dim=1))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(columns, table.mean(dim=0).tolist(), strict=True):
            metrics[name].append(value)


@contextmanager
def _no_reference() -> Iterator[None]:
    """While it lasts, DPOTrainer finds no model to load as a reference: it has no argument that says so."""
    load = dpo_trainer.create_model_from_path
    dpo_trainer.create_model_from_path = lambda *_, **__: None
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path = load


def _trainer(parts: Parts, charging: Charging) -> ReferenceFreeTrainer:
    return ReferenceFreeTrainer(charging, args=pair_arguments(parts), **pair_parts(parts))


def contrastive(parts: Parts) -> ReferenceFreeTrainer:
    """The trainer of contrastive preference optimisation."""
    return _trainer(parts, cpo(parts.config.spec.cpo or Cpo()))


def simple(parts: Parts) -> ReferenceFreeTrainer:
    """The trainer of simple preference optimisation."""
    return _trainer(parts, simpo(parts.config.spec.simpo or Simpo()))


def odds_ratio(parts: Parts) -> ReferenceFreeTrainer:
    """The trainer of odds-ratio preference optimisation."""
    return _trainer(parts, orpo(parts.config.spec.orpo or Orpo()))
