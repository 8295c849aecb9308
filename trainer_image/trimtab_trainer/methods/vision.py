"""Batches that show something: what stands for it in the token ids becomes placeholders, and its tensors are added.

Every method's batches come through here: those of collators, and those of rollouts before the model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.data.opened import Media
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.model.senses import Senses

Batch = dict[str, Any]
Sight = Callable[[Mapping[str, Any]], Batch]
"""From a batch whose ids may show something to what a model takes."""

_IDS = "input_ids"
TYPES = "mm_token_type_ids"
"""Which tokens are of an image or a video: models that place those in two or three dimensions ask for it."""


def sight(parts: Parts) -> Sight:
    """How the batches of a run are looked at; nothing is done where its rows show nothing."""
    return sight_of(parts.processor, parts.media)


def sight_of(processor: Any, media: Media | None) -> Sight:
    """The same, before there are parts of a trainer."""
    return dict if media is None else Looking(processor, media)


def unsayable(parts: Parts) -> list[int]:
    """Tokens that a model may read and must not say, because an image, a video or a sound stands behind each."""
    return unsayable_of(parts.processor, parts.media)


def unsayable_of(processor: Any, media: Media | None) -> list[int]:
    """The same, before there are parts of a trainer."""
    return [] if media is None else list(Senses(processor).ids.values())


class SeeingCollator:
    """A collator whose rows may show something."""

    def __init__(self, collate: Callable[[Any], Batch], look: Sight):
        self._collate = collate
        self._look = look

    def __call__(self, rows: Any) -> Batch:
        """What the collator gives, as the model takes it."""
        return self._look(self._collate(rows))


class Looking:
    """Opens what a batch shows."""

    def __init__(self, processor: Any, media: Media):
        self._senses = Senses(processor)
        self._media = media

    def __call__(self, batch: Mapping[str, Any]) -> Batch:
        """The batch with placeholders, and with what is shown as the processor prepares it, in its order.

        Further ids (KL_input_ids) show what input_ids show; they get placeholders alone.
        """
        found = dict(batch)
        for name in [name for name in batch if name.endswith(_IDS)]:
            ids, shown = self._opened(batch[name], tensors=name == _IDS)
            found[name] = ids
            types = self._senses.types(ids.tolist())
            if types is not None:
                found[name.removesuffix(_IDS) + TYPES] = torch.tensor(types, device=ids.device)
            for key, values in shown.items():
                found[key] = torch.cat(values).to(ids.device)
        return found

    def _opened(self, marked: torch.Tensor, tensors: bool) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Ids [rows, tokens] without marks and, with `tensors`, what is prepared of each showing in reading order."""
        ids, marks = marked.clone(), marked.cpu()
        for mark in marks[marks < 0].unique().tolist():
            ids[marked == mark] = self._senses.ids[self._media.shown[-1 - mark].kind]
        shown: dict[str, list[torch.Tensor]] = {}
        known: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
        for row in marks if tensors else ():
            remaining: dict[int, int] = {}
            for mark in row[row < 0].tolist():
                number = -1 - mark
                if not remaining.get(number):
                    known[number] = known.get(number) or self._senses.prepared(self._media.shown[number])
                    remaining[number] = known[number][0]
                    for key, value in known[number][1].items():
                        shown.setdefault(key, []).append(value)
                remaining[number] -= 1
            self._see_whole(remaining)
        return ids, shown

    def _see_whole(self, remaining: Mapping[int, int]) -> None:
        """Raise Fault(ModelInvalid) when something becomes more tokens than were counted for it."""
        for number in [number for number, rest in remaining.items() if rest]:
            medium = self._media.shown[number]
            problem = f"{medium.kind} {medium.path.name} becomes another number of tokens than the processor said"
            raise Fault(Reason.MODEL_INVALID, problem, "Name a model of the Qwen-VL kind.")
