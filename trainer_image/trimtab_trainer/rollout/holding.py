"""What a trainer holds from one step to the next, carried through a checkpoint with each process's random state.

A round of answers is learnt from in several steps, and a checkpoint may come between two of them. The file of random
states is the one that each process writes, uploads and must find again: the rest of the round belongs into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab_trainer.checkpoint import random_state_file

HELD = "held"


class Holding:
    """Mixed into a transformers.Trainer, before it in the order of bases."""

    def held(self) -> dict[str, Any]:
        """What shall be there again: plain values and tensors, in dicts and lists."""
        raise NotImplementedError

    def hold(self, held: dict[str, Any]) -> None:
        """Take it back."""
        raise NotImplementedError

    def _save_rng_state(self, output_dir: str) -> None:
        base: Any = super()
        base._save_rng_state(output_dir)
        path = self._random_state(output_dir)
        torch.save({**self._read(path), HELD: self.held()}, path)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        base: Any = super()
        base._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.hold(self._read(self._random_state(checkpoint))[HELD])

    def _random_state(self, folder: str) -> Path:
        trainer: Any = self
        return Path(folder) / random_state_file(trainer.args.process_index, trainer.args.world_size)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        from transformers.trainer_pt_utils import safe_globals

        with safe_globals():
            found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return found
