"""Batches in which several documents stand in one row, and the proof that none of them sees another.

No attention mask is given: transformers then tells documents apart by positions that begin anew, with a block-diagonal
mask or, under flash attention, by lengths. A model that does not is found out before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from trimtab_api.conditions import Reason
from trimtab_trainer.data.packing import LENGTHS
from trimtab_trainer.data.sequences import IGNORED, TOKENS, WEIGHTS
from trimtab_trainer.endings import Fault

LEAK = 0.1
"""Share of the change that a document in front makes when it is seen, that is borne as rounding when it must not be."""


class Documents:
    """Makes a batch of packs, or of sequences that are one document each.

    `joined`: all documents in one row, as flash attention wants it; else a row for each pack, padded at its end.
    """

    def __init__(self, pad_token_id: int, joined: bool):
        self._pad = pad_token_id
        self._joined = joined

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """A batch of equal lengths: input_ids, labels, position_ids, tokens, and weights where they are not all 1."""
        lengths = [row.get(LENGTHS) or [len(row["input_ids"])] for row in rows]
        whole = {
            "input_ids": [torch.as_tensor(row["input_ids"]) for row in rows],
            "labels": [_labels(row, sizes) for row, sizes in zip(rows, lengths, strict=True)],
            "position_ids": [torch.cat([torch.arange(size) for size in sizes]) for sizes in lengths],
        }
        fill: dict[str, float] = {"input_ids": self._pad, "labels": IGNORED, "position_ids": 0, WEIGHTS: 1.0}
        if any(row.get(WEIGHTS) for row in rows):
            whole[WEIGHTS] = [
                torch.as_tensor(row[WEIGHTS] or [1.0] * len(row["input_ids"]), dtype=torch.float32) for row in rows
            ]
        batch = {name: self._together(parts, fill[name]) for name, parts in whole.items()}
        return {**batch, TOKENS: torch.tensor(sum(map(sum, lengths)))}

    def _together(self, parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        if self._joined:
            return torch.cat(parts).unsqueeze(0)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def _labels(row: dict[str, list[Any]], sizes: list[int]) -> torch.Tensor:
    labels = torch.as_tensor(row["labels"]).clone()
    labels[torch.tensor([0, *sizes[:-1]]).cumsum(0)] = IGNORED
    return labels


class Apart(TrainerCallback):
    """Sees before the first step that a document does not see the one in front of it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise Fault(SpecInvalid) when the model's attention goes across documents."""
        see_apart(given["model"])


def see_apart(model: Any) -> None:
    """Hold a document's logits behind another one against its logits alone.

    Raises Fault(SpecInvalid) when they differ by more than rounding.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    device = next(model.parameters()).device
    before, document = torch.arange(8).reshape(2, 1, 4).to(device) % vocabulary
    both, inner = torch.cat([before, document], dim=1), torch.arange(4, device=device).unsqueeze(0)
    positions = torch.cat([inner, inner], dim=1)

    def logits(ids: torch.Tensor, **given: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, use_cache=False, **given).logits[:, -4:].float()
        return found

    training = model.training
    model.eval()
    with torch.no_grad():
        alone = logits(document)
        packed = (logits(both, position_ids=positions) - alone).abs().max()
        seen = (logits(both) - alone).abs().max()
    model.train(training)
    if packed > LEAK * seen:
        raise Fault(
            Reason.SPEC_INVALID,
            f"dataset.packing: a {model.config.model_type} model with {model.config._attn_implementation} attention "
            "lets documents of a pack see each other",
            "Remove dataset.packing and dataset.paddingFree for this model.",
        )
