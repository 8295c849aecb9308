"""Which prompts are asked when: rounds of prompts, each repeated for as many forward passes as it is learnt from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


class Rounds(Sampler[int]):
    """Row numbers, round by round.

    A round holds `prompts` rows, each `copies` times in a row, and comes `repeats` times, because a trainer asks its
    loader at every forward pass. The last round of an epoch is filled up from the epoch's beginning. An epoch's order
    follows from seed and epoch alone, so a run that goes on has it again.
    """

    def __init__(self, rows: int, prompts: int, copies: int, repeats: int, shuffle: bool, seed: int):
        self._rows = rows
        self._prompts = prompts
        self._copies = copies
        self._repeats = repeats
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._rows))
        if self._shuffle:
            draw = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(self._rows, generator=draw).tolist()
        for start in range(0, self._rows, self._prompts):
            chosen = [order[place % self._rows] for place in range(start, start + self._prompts)]
            for _ in range(self._repeats):
                for row in chosen:
                    yield from (row for _ in range(self._copies))

    def __len__(self) -> int:
        return -(-self._rows // self._prompts) * self._prompts * self._copies * self._repeats


class InOrder(TrainerCallback):
    """Tells the rounds which epoch begins: of several processes' loaders, one that skips rows does not pass it on."""

    def __init__(self) -> None:
        self.rounds: Rounds | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on begins in the middle of its epoch."""
        if self.rounds is not None:
            self.rounds.set_epoch(math.floor((state.epoch or 0) + 1e-6))
