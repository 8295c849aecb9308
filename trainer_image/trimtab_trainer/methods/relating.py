"""The trainer of embedders: vectors of a batch's texts, moved by a loss of sentence-transformers.

Their trainer is not used: it owns the model's wrapping, its checkpoints and its rows, which are ours for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab_api.v1alpha1.heads import Embedding
from trimtab_trainer.data.sequences import TARGETS
from trimtab_trainer.data.whole import parted
from trimtab_trainer.methods import metrics
from trimtab_trainer.methods.judging import WholeTrainer, padded, whole_arguments
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model.heads import embedding
from trimtab_trainer.model.vector import embed_ids

TEMPERATURE = 0.1
"""Of infonce (ms-swift's)."""
MARGIN = 0.5
"""Of contrastive losses (sentence-transformers')."""


class RelationCollator:
    """All texts of a batch in one: the anchors, the texts beside them, then whatever negatives there are."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """closeness [rows], input_ids and attention_mask [texts, tokens]."""
        texts = [list(parted(row)) for row in rows]
        ordered = [each[0] for each in texts] + [each[1] for each in texts]
        ids, mask = padded(ordered + [negative for each in texts for negative in each[2:]], self._pad)
        closeness = torch.tensor([row[TARGETS][0] for row in rows])
        return {"closeness": closeness, "input_ids": ids, "attention_mask": mask}


class RelatingTrainer(WholeTrainer):
    """One forward pass over all texts of a batch; the loss looks at those of all processes."""

    asked = Embedding()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; with the outputs, the vectors [rows, 2, width] of anchors and the texts beside them as well."""
        closeness = inputs["closeness"]
        vectors = embed_ids(model, self.asked, inputs["input_ids"], inputs["attention_mask"]).float()
        count = len(closeness)
        sides = [vectors[:count], vectors[count : 2 * count], vectors[2 * count :]]
        loss = relation_loss([everywhere(each) for each in sides], everywhere(closeness), self.asked)
        # Each process has the loss of the whole batch and the gradient of its own rows: their sum is the gradient,
        # and what moves gradients takes the mean.
        loss = loss + (world() - 1) * (loss - loss.detach())
        if not return_outputs:
            return loss
        return loss, {"vectors": torch.stack(sides[:2], dim=1).detach()}


def relation_loss(sides: list[torch.Tensor], closeness: torch.Tensor, asked: Embedding) -> torch.Tensor:
    """From vectors of anchors and others [rows, width], negatives [any, width], and closeness [rows].

    With matryoshkaDims the sum over those sizes and the whole, as MatryoshkaLoss has it.
    """
    from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

    vectors = [side for side in sides if len(side)] if asked.loss == "infonce" else sides[:2]
    measure = _measure(asked)
    width = vectors[0].shape[-1]
    sizes = sorted({width, *(asked.matryoshka_dims or ())}, reverse=True)
    parts = [vectors if size == width else [shrink(each, size) for each in vectors] for size in sizes]
    losses = [measure.compute_loss_from_embeddings(each, closeness) for each in parts]
    return torch.stack(losses).sum()


def _measure(asked: Embedding) -> Any:
    """The loss of sentence-transformers; it is given vectors, so it needs no model."""
    from sentence_transformers.sentence_transformer import losses

    if asked.loss == "cosineSimilarity":
        return losses.CosineSimilarityLoss(None)
    if asked.loss == "contrastive":
        return losses.ContrastiveLoss(None, margin=asked.margin or MARGIN)
    if asked.loss == "onlineContrastive":
        return losses.OnlineContrastiveLoss(None, margin=asked.margin or MARGIN)
    return losses.MultipleNegativesRankingLoss(None, scale=1 / (asked.temperature or TEMPERATURE))


def everywhere(mine: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order; gradients flow to one's own alone."""
    if world() == 1:
        return mine
    import torch.distributed as dist

    counts = [torch.zeros(1, dtype=torch.long, device=mine.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    room = mine.new_zeros((max(int(count) for count in counts), *mine.shape[1:]))
    room[: len(mine)] = mine.detach()
    gathered = [torch.empty_like(room) for _ in counts]
    dist.all_gather(gathered, room)
    parts = [rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)]
    parts[dist.get_rank()] = mine
    return torch.cat(parts)


def world() -> int:
    """How many processes compute together."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def relating(parts: Parts) -> RelatingTrainer:
    """The trainer of embedders."""
    asked = embedding(parts.config.spec)
    trainer = RelatingTrainer(
        model=parts.model,
        args=whole_arguments(parts, "closeness"),
        data_collator=RelationCollator(parts.tokenizer.pad_token_id),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        compute_metrics=metrics.of_vectors if asked.loss == "infonce" else metrics.of_pairs,
        callbacks=parts.callbacks,
    )
    trainer.asked = asked
    return trainer
