"""From prompts to answers: the one function that every method asks, and the engine that stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from trimtab_trainer.methods.vision import Sight
from trimtab_trainer.strategies.speaking import speaking

TokenIds = Sequence[int]

VALUE_HEAD = "value_head"
"""What ppo hangs on the model to learn values with: part of no artifact, and of nothing that an engine is given."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    longest: int
    """Most tokens of an answer."""
    temperature: float
    """0 takes the likeliest token."""
    stops: Sequence[int]
    """Tokens that end an answer; the one that ended it is its last."""
    pad: int
    top_p: float = 1.0
    never: Sequence[int] = ()
    """Tokens that an answer has none of: what stands for an image would want one."""


@dataclass(frozen=True)
class Spoken:
    """Answers, in the order of their prompts."""

    answers: list[list[int]]
    """Token ids; at least one each."""
    log_probs: list[list[float]] | None
    """Log-probability of each token as it was drawn; None when the trained model itself drew it, so that its own
    forward pass says the same."""


class Engine(Protocol):
    """Whoever draws answers."""

    def generate(self, prompts: Sequence[TokenIds]) -> Spoken:
        """One answer to each prompt, drawn from the model as it is now.

        Called by all processes at once, each with its own prompts.
        """
        ...


class OwnModel:
    """The trained model draws for itself, through transformers. Its randomness is torch's, so a checkpoint holds it.

    `model`: who is asked in place of the trainer's model as it is wrapped. `together`: weights are split, so that every
    forward pass is one of all processes; those that are done go along until the last one is.
    """

    def __init__(self, trainer: Any, sampling: Sampling, look: Sight, model: Any = None, together: bool = False):
        self._trainer = trainer
        self._look = look
        self._sampling = sampling
        self._model = model
        self._together = together
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": None}
        self._settings: dict[str, Any] = {
            "max_new_tokens": sampling.longest,
            "do_sample": sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            "repetition_penalty": 1.0,
            "suppress_tokens": list(sampling.never) or None,
            "eos_token_id": list(sampling.stops),
            "pad_token_id": sampling.pad,
        }

    def generate(self, prompts: Sequence[TokenIds]) -> Spoken:
        """See Engine."""
        trainer = self._trainer
        wrapped = trainer.model_wrapped if self._model is None else self._model
        ids, mask = pad_left(prompts, self._sampling.pad, trainer.args.device)
        asked = self._look({"input_ids": ids, "attention_mask": mask})
        with (
            # The model's own settings would fill in whatever equals a library default: all of them are replaced.
            speaking(trainer, wrapped, self._settings, whole=not self._together) as model,
            torch.no_grad(),
            trainer.accelerator.autocast(),
        ):
            training = model.training
            model.eval()
            settings = GenerationConfig(**self._settings, disable_compile=True)
            whole = model.generate(**asked, generation_config=settings, synced_gpus=self._together)
            model.train(training)
        drawn = whole[:, ids.shape[1] :].tolist()
        return Spoken([self._ended(answer) for answer in drawn], None)

    def _ended(self, answer: list[int]) -> list[int]:
        """Up to the first token that ends an answer."""
        stops = set(self._sampling.stops)
        return next((answer[: place + 1] for place, token in enumerate(answer) if token in stops), answer)


def pad_left(rows: Sequence[TokenIds], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], padded before, so that all end at one place."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def pad_right(rows: Sequence[TokenIds], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [rows, longest], padded behind, so that all begin at one place."""
    longest = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)
