"""Trainers of models that answer with numbers: rewards, labels, and scores of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from trimtab_api.v1alpha1.heads import Reranker
from trimtab_trainer.arguments import UnnumberedCpu, common
from trimtab_trainer.data.sequences import TARGETS
from trimtab_trainer.data.whole import parted
from trimtab_trainer.methods import metrics
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import SeeingCollator, sight
from trimtab_trainer.model.heads import ScalarHead, head_of


class WholeArguments(UnnumberedCpu, TrainingArguments):
    """TrainingArguments for runs on any device."""


class RewardArguments(UnnumberedCpu, RewardConfig):
    """RewardConfig for runs on any device."""


def whole_arguments(parts: Parts, targets: str) -> WholeArguments:
    """The arguments of a trainer whose evaluation looks at predictions; `targets` is what a batch calls the truth."""
    known = common(parts.config, parts.folder, validated=parts.validation is not None)
    return WholeArguments(**{**known, "prediction_loss_only": False, "label_names": [targets]})


def padded(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [sequences, tokens], padded at the right end, and their mask."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    rows = [torch.as_tensor(ids) for ids in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return ids, (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()


# ------------------------------------------------------------ rewards


class RewardingTrainer(Observed, RewardTrainer):
    """TRL's trainer: -log σ(r(chosen) - r(rejected)), the Bradley-Terry likelihood of the preferred answer."""

    def __init__(self, **parts: Any):
        super().__init__(**parts)
        # On quantised weights it rounds what is trained to bfloat16; a head then takes no states of float32.
        for weight in self.model.parameters():
            if weight.requires_grad and weight.dtype == torch.bfloat16 and getattr(self.model, "is_quantized", False):
                weight.data = weight.data.float()


def rewarding(parts: Parts) -> RewardingTrainer:
    """The trainer of reward models."""
    asked = parts.config.spec.reward_model
    known = common(parts.config, parts.folder, validated=parts.validation is not None)
    arguments = RewardArguments(
        **known,
        center_rewards_coefficient=None if asked is None else asked.center_rewards_coefficient,
        max_length=None,
    )
    return RewardingTrainer(
        model=parts.model,
        args=arguments,
        data_collator=SeeingCollator(DataCollatorForPreference(parts.tokenizer.pad_token_id), sight(parts)),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=parts.callbacks,
    )


# ------------------------------------------------------------ labels


class LabelCollator:
    """Pads a batch and gives its labels the form that transformers' losses want."""

    def __init__(self, pad_token_id: int, head: ScalarHead):
        self._pad = pad_token_id
        self._head = head

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, and labels: [rows] of one label, or [rows, labels] of 0 and 1 or real numbers."""
        ids, mask = padded([row["input_ids"] for row in rows], self._pad)
        targets = [row[TARGETS] for row in rows]
        if self._head.problem_type == "single_label_classification":
            labels = torch.tensor([int(each[0]) for each in targets])
        elif self._head.problem_type == "regression":
            labels = torch.tensor(targets)
        else:
            labels = torch.zeros((len(rows), self._head.size))
            for index, each in enumerate(targets):
                labels[index, [int(number) for number in each]] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class WholeTrainer(Observed, Trainer):
    """transformers' trainer with losses that are means over the rows of a forward pass."""

    def __init__(self, **parts: Any):
        super().__init__(**parts)
        # Told a count of tokens, the losses of classifiers would be divided twice or not at all.
        self.model_accepts_loss_kwargs = False


def labelling(parts: Parts) -> WholeTrainer:
    """The trainer of classifiers and regressions: the loss is the model's own, by its problem_type."""
    head = head_of(parts.config.spec)
    assert isinstance(head, ScalarHead)
    assert head.problem_type is not None
    return WholeTrainer(
        model=parts.model,
        args=whole_arguments(parts, "labels"),
        data_collator=SeeingCollator(LabelCollator(parts.tokenizer.pad_token_id, head), sight(parts)),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        compute_metrics=metrics.of_labels(head.problem_type),
        callbacks=parts.callbacks,
    )


# ------------------------------------------------------------ documents


class RankingCollator:
    """A batch of queries with their documents; queries with fewer documents than others have empty places."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """relevance [queries, documents], input_ids and attention_mask [documents of all queries, tokens]."""
        widest = max(len(row["lengths"]) for row in rows)
        relevance = torch.full((len(rows), widest), metrics.ABSENT)
        for index, row in enumerate(rows):
            relevance[index, : len(row[TARGETS])] = torch.tensor(row[TARGETS])
        ids, mask = padded([ids for row in rows for ids in parted(row)], self._pad)
        return {"relevance": relevance, "input_ids": ids, "attention_mask": mask}


class RankingTrainer(WholeTrainer):
    """Scores of documents, each by itself or against the others of its query."""

    asked = Reranker()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; with the outputs, scores [queries, documents] as well."""
        relevance = inputs["relevance"]
        asked = {name: value for name, value in inputs.items() if name != "relevance"}
        logits = model(**asked).logits[:, 0].float()
        loss = ranking_loss(logits, relevance, self.asked)
        if not return_outputs:
            return loss
        scores = torch.full_like(relevance, metrics.ABSENT)
        scores[relevance != metrics.ABSENT] = logits.detach()
        return loss, {"scores": scores}


def ranking_loss(logits: torch.Tensor, relevance: torch.Tensor, asked: Reranker) -> torch.Tensor:
    """From logits [documents of all queries] in the order of the places of `relevance` that are not ABSENT.

    pointwise: binary cross-entropy, the mean over documents. listwise: -log of the softmax over a query's documents at
    its positive, which is the first, the mean over queries.
    """
    present = relevance != metrics.ABSENT
    if asked.loss == "pointwise":
        return functional.binary_cross_entropy_with_logits(logits, relevance[present])
    scores = torch.full_like(relevance, -torch.inf, dtype=logits.dtype).masked_scatter(present, logits)
    first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    return functional.cross_entropy(scores / (asked.temperature or 1.0), first)


def ranking(parts: Parts) -> RankingTrainer:
    """The trainer of rerankers."""
    trainer = RankingTrainer(
        model=parts.model,
        args=whole_arguments(parts, "relevance"),
        data_collator=SeeingCollator(RankingCollator(parts.tokenizer.pad_token_id), sight(parts)),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        compute_metrics=metrics.of_rankings,
        callbacks=parts.callbacks,
    )
    trainer.asked = parts.config.spec.reranker or Reranker()
    return trainer
