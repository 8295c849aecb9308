"""Answers that are each good or bad, against a reference point that is measured on mismatched pairs of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from trimtab_api.v1alpha1.preference import Kto
from trimtab_trainer.arguments import UnnumberedCpu, common
from trimtab_trainer.data.sequences import IGNORED
from trimtab_trainer.methods.paired import padded
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.reference import Compared, reference
from trimtab_trainer.methods.vision import SeeingCollator, sight


class JudgedArguments(UnnumberedCpu, KTOConfig):
    """KTOConfig for runs on any device."""


class JudgedCollator:
    """A batch of answers, and the same prompts with each other's answers.

    The mismatched ones are made here, of whatever rows met in a batch, so that rows can be shuffled anew each epoch.
    """

    def __init__(self, pad_token_id: int, max_length: int):
        self._pad = pad_token_id
        self._max_length = max_length

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """label of (rows,); input_ids, attention_mask and completion_mask of (rows, longest), and KL_ ones."""
        own = [(row["input_ids"], row["labels"]) for row in rows]
        begins = [next(i for i, label in enumerate(labels) if label != IGNORED) for _, labels in own]
        mismatched = [
            (
                [*ids[:begin], *own[index - 1][0][begins[index - 1] :]][: self._max_length],
                [*labels[:begin], *own[index - 1][1][begins[index - 1] :]][: self._max_length],
            )
            for index, ((ids, labels), begin) in enumerate(zip(own, begins, strict=True))
        ]
        return {
            **self._sequences("", own),
            **self._sequences("KL_", mismatched),
            "label": torch.tensor([bool(row["label"][0]) for row in rows]),
        }

    def _sequences(self, prefix: str, sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}input_ids": padded([ids for ids, _ in sequences], self._pad),
            f"{prefix}attention_mask": padded([[1] * len(ids) for ids, _ in sequences], 0),
            f"{prefix}completion_mask": (padded([labels for _, labels in sequences], IGNORED) != IGNORED).long(),
        }


class JudgedTrainer(Compared, KTOTrainer):
    """KTOTrainer on rows that are tokens already, in any order."""

    def __init__(self, strategy: str, **parts: Any):
        super().__init__(**parts)
        # It asks for rows in order because it pairs them beforehand; here the collator does.
        self.args.train_sampling_strategy = strategy

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def judged(parts: Parts) -> JudgedTrainer:
    """The trainer of Kahneman-Tversky optimisation."""
    config = parts.config
    knobs = config.spec.kto or Kto()
    shared = common(config, parts.folder, validated=parts.validation is not None)
    strategy = shared.pop("train_sampling_strategy")
    return JudgedTrainer(
        strategy=strategy,
        args=JudgedArguments(
            **shared,
            train_sampling_strategy="sequential",
            max_length=None,
            beta=knobs.beta,
            desirable_weight=knobs.desirable_weight,
            undesirable_weight=knobs.undesirable_weight,
        ),
        model=parts.model,
        ref_model=reference(parts),
        data_collator=SeeingCollator(
            JudgedCollator(parts.tokenizer.pad_token_id, config.spec.dataset.max_length), sight(parts)
        ),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=parts.callbacks,
    )
