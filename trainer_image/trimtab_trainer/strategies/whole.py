"""Every process computes with whole weights that lie on its device, or on several when it is alone."""

from __future__ import annotations

from typing import Any


class Whole:
    """none, ddp and deviceMap: see strategies.Strategy."""

    splits_weights = False
    master_weights = False

    def __init__(self, name: str):
        self.name = name

    def prepare(self) -> None:
        """Nothing."""

    def loading(self) -> dict[str, Any]:
        """A lone process may lay the layers over its devices."""
        return {"device_map": "auto"} if self.name == "deviceMap" else {}

    def arguments(self) -> dict[str, Any]:
        """Nothing: the library's defaults are this."""
        return {}

    def checkpoint_files(self, step: int) -> set[str]:
        """The optimiser in one file."""
        return {"optimizer.pt", "scheduler.pt"}

    def go_on(self, trainer: Any, checkpoint: str, total_steps: int) -> None:
        """The weights are all there is to load."""
        trainer._load_from_checkpoint(checkpoint)
