"""Batches that show images: what stands for an image in the token ids becomes its tokens, and its pixels are added.

Every method's batches come through here: those of collators, and those of rollouts before the model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.data.media import Media
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model import vision

Batch = dict[str, Any]
Sight = Callable[[Mapping[str, Any]], Batch]
"""From a batch whose ids may show images to what a model takes."""

_IDS = "input_ids"
_TEXT = (_IDS, "attention_mask", "token_type_ids", "mm_token_type_ids")
TYPES = "mm_token_type_ids"
"""Which tokens are of an image: models that place images in two dimensions ask for it."""


def sight(parts: Parts) -> Sight:
    """How the batches of a run are looked at; nothing is done where its rows show no images."""
    return dict if parts.media is None else Looking(parts.processor, parts.media)


def unsayable(parts: Parts) -> list[int]:
    """Tokens that a model may read and must not say, because an image or a video stands behind each."""
    return [] if parts.media is None else vision.placeholders(parts.processor)


class SeeingCollator:
    """A collator whose rows may show images."""

    def __init__(self, collate: Callable[[Any], Batch], look: Sight):
        self._collate = collate
        self._look = look

    def __call__(self, rows: Any) -> Batch:
        """What the collator gives, as the model takes it."""
        return self._look(self._collate(rows))


class Looking:
    """Opens the images that a batch shows."""

    def __init__(self, processor: Any, media: Media):
        self._processor = processor
        self._media = media

    def __call__(self, batch: Mapping[str, Any]) -> Batch:
        """The batch with the images' tokens, and with the images as the processor prepares them, in their order.

        Further ids (KL_input_ids) show what input_ids show; they get tokens alone.
        """
        found = dict(batch)
        for name in [name for name in batch if name.endswith(_IDS)]:
            ids, shown = self._opened(batch[name])
            found[name] = ids
            if TYPES in self._processor.model_input_names:
                types = torch.tensor(self._processor.create_mm_token_type_ids(ids.tolist()), device=ids.device)
                found[name.removesuffix(_IDS) + TYPES] = types
            if name == _IDS:
                for key in shown[0] if shown else ():
                    found[key] = torch.cat([each[key] for each in shown]).to(ids.device)
        return found

    def _opened(self, marked: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """Ids [rows, tokens] without marks, and what was prepared of their images, in reading order."""
        ids, known, shown = marked.clone(), dict[int, tuple[list[int], dict[str, torch.Tensor]]](), []
        for row, start, number in self._images(marked, known):
            tokens, prepared = known[number]
            ids[row, start : start + len(tokens)] = torch.tensor(tokens, device=ids.device)
            shown.append(prepared)
        return ids, shown

    def _images(self, marked: torch.Tensor, known: dict[int, Any]) -> Iterator[tuple[int, int, int]]:
        """Row, first token and number of each image; what is prepared of it is then in `known`."""
        marks = marked.cpu()
        places = (marks < 0).nonzero().tolist()
        next_place = 0
        while next_place < len(places):
            row, start = places[next_place]
            number = -1 - int(marks[row, start])
            if number not in known:
                known[number] = self._prepare(number)
            length = len(known[number][0])
            if not bool((marks[row, start : start + length] == -1 - number).all()):
                name = self._media.paths[number].name
                problem = f"image {name} becomes {length} tokens, and the processor said another number"
                raise Fault(Reason.MODEL_INVALID, problem, "Name a model of the Qwen-VL kind.")
            yield row, start, number
            next_place += length

    def _prepare(self, number: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        from PIL import Image

        with Image.open(self._media.paths[number]) as image:
            made: Any = self._processor(
                text=[self._processor.image_token],
                images=[image.convert("RGB")],
                add_special_tokens=False,
                return_tensors="pt",
            )
        return made[_IDS][0].tolist(), {name: value for name, value in made.items() if name not in _TEXT}
