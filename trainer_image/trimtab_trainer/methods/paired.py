"""Two answers side by side: the batch that every pairwise method sees, and direct preference optimisation on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from trimtab_api.inputs import DPO_REFERENCE
from trimtab_api.v1alpha1.preference import Dpo
from trimtab_trainer.arguments import UnnumberedCpu, common
from trimtab_trainer.data.sequences import IGNORED
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.reference import Compared, reference
from trimtab_trainer.methods.vision import SeeingCollator, sight

_LOSSES = {
    "exoPair": "exo_pair",
    "ncaPair": "nca_pair",
    "bcoPair": "bco_pair",
    "sppoHard": "sppo_hard",
    "aotUnpaired": "aot_unpaired",
    "apoZero": "apo_zero",
    "apoDown": "apo_down",
    "sigmoidNorm": "sigmoid_norm",
}
"""TRL's names of losses, where they are not ours."""


class PairArguments(UnnumberedCpu, DPOConfig):
    """DPOConfig for runs on any device."""


def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Rows of unequal length as one tensor, filled at the right end: (rows, longest)."""
    result = torch.full((len(rows), max(map(len, rows))), filler, dtype=torch.long)
    for index, row in enumerate(rows):
        result[index, : len(row)] = torch.as_tensor(row)
    return result


class PairCollator:
    """A batch of pairs: the chosen sides, then the rejected ones."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and completion_mask of (2 x pairs, longest); the reference's, when precomputed."""
        ids = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
        labels = [row[f"{side}_labels"] for side in ("chosen", "rejected") for row in rows]
        batch = {
            "input_ids": padded(ids, self._pad),
            "attention_mask": padded([[1] * len(each) for each in ids], 0),
            "completion_mask": (padded(labels, IGNORED) != IGNORED).long(),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


class PairTrainer(Compared, DPOTrainer):
    """DPOTrainer on rows that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def pair_arguments(parts: Parts, **own: Any) -> PairArguments:
    """The arguments of a pairwise method."""
    return PairArguments(
        **common(parts.config, parts.folder, validated=parts.validation is not None), max_length=None, **own
    )


def pair_parts(parts: Parts) -> dict[str, Any]:
    """What every pairwise trainer is made of, beside its arguments."""
    return {
        "model": parts.model,
        "data_collator": SeeingCollator(PairCollator(parts.tokenizer.pad_token_id), sight(parts)),
        "train_dataset": parts.train,
        "eval_dataset": parts.validation,
        "processing_class": parts.tokenizer,
        "callbacks": parts.callbacks,
    }


def direct(parts: Parts) -> PairTrainer:
    """The trainer of direct preference optimisation."""
    knobs = parts.config.spec.dpo or Dpo()
    losses = [_LOSSES.get(name, name) for name in knobs.loss_type]
    weights = list(knobs.loss_weights or [1.0] * len(losses))
    if knobs.rpo_alpha is not None:
        losses, weights = [*losses, "sft"], [*weights, knobs.rpo_alpha]
    trainer = PairTrainer(
        args=pair_arguments(
            parts,
            beta=knobs.beta,
            loss_type=losses,
            loss_weights=weights,
            label_smoothing=knobs.label_smoothing,
            ld_alpha=knobs.ld_alpha,
            precompute_ref_log_probs=knobs.precompute_ref_log_probs,
        ),
        ref_model=reference(parts, DPO_REFERENCE, knobs.precompute_ref_log_probs),
        **pair_parts(parts),
    )
    if knobs.precompute_ref_log_probs:
        # Everything it could say is written down.
        trainer.ref_model = None
    return trainer
