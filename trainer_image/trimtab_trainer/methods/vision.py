"""Batches of conversations with images: each placeholder becomes the tokens that its image needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab_trainer.data.media import Media
from trimtab_trainer.data.seen import MEDIA
from trimtab_trainer.data.sequences import IGNORED, WEIGHTS
from trimtab_trainer.methods.causal import Collator

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
TYPES = "mm_token_type_ids"
"""Which tokens are of an image: models that place images in two dimensions ask for it."""


class SeeingCollator:
    """Opens the images of a batch, and pads it at its right end."""

    def __init__(self, processor: Any, media: Media, pad_token_id: int):
        self._processor = processor
        self._media = media
        self._pad = Collator(pad_token_id)
        token: Any = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._placeholder = int(token)

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """What Collator gives, with the images as the model's processor prepares them, in the batch's order."""
        prepared: list[dict[str, torch.Tensor]] = []
        batch = self._pad([self._grown(row, prepared) for row in rows])
        for name in prepared[0] if prepared else ():
            batch[name] = torch.cat([each[name] for each in prepared])
        if TYPES in self._processor.model_input_names:
            batch[TYPES] = torch.tensor(self._processor.create_mm_token_type_ids(batch["input_ids"]))
        return batch

    def _grown(self, row: dict[str, list[Any]], prepared: list[dict[str, torch.Tensor]]) -> dict[str, list[Any]]:
        """A row with each placeholder in the place of as many tokens; what was prepared of its images is added."""
        grown: dict[str, list[Any]] = {"input_ids": [], "labels": [], WEIGHTS: []}
        images = iter(row[MEDIA])
        for position, token in enumerate(row["input_ids"]):
            if token != self._placeholder:
                tokens, labels = [token], [row["labels"][position]]
            else:
                tokens = self._prepare(next(images), prepared)
                labels = [IGNORED] * len(tokens)
            grown["input_ids"] += tokens
            grown["labels"] += labels
            if row.get(WEIGHTS):
                grown[WEIGHTS] += [row[WEIGHTS][position]] * len(tokens)
        return grown

    def _prepare(self, number: int, prepared: list[dict[str, torch.Tensor]]) -> list[int]:
        from PIL import Image

        with Image.open(self._media.paths[number]) as image:
            made: Any = self._processor(
                text=[self._processor.image_token],
                images=[image.convert("RGB")],
                add_special_tokens=False,
                return_tensors="pt",
            )
        prepared.append({name: value for name, value in made.items() if name not in _TEXT})
        ids: list[int] = made["input_ids"][0].tolist()
        return ids
