"""How the engine beside the trainer gets the weights of a step: an adapter, or all of them.

Each adapter has a name and a folder of its own: what the engine keeps of earlier answers belongs to a name, and would
else be taken for what the new weights would say. Whole weights take the place of the old ones, and what the engine kept
is dropped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from trimtab_api.conditions import Reason
from trimtab_api.contract import ROLLOUT_MODEL
from trimtab_trainer.endings import Fault
from trimtab_trainer.model.adapter import WEIGHTS
from trimtab_trainer.rollout.engine import VALUE_HEAD
from trimtab_trainer.rollout.reference import is_adapted
from trimtab_trainer.rollout.wire import Wire
from trimtab_trainer.strategies import gathering

ADAPTER = "default"
"""The name of the adapter that is trained, in the model."""

Weights = dict[str, torch.Tensor]


class Handing(Protocol):
    """One way."""

    rank: int
    """Of the adapter; 0 without one."""
    name: str
    """What the engine calls the weights that it has."""

    def gather(self, model: Any, leader: bool) -> Weights:
        """What is handed over, in the main memory of each pod's leader. All processes take part."""
        ...

    def hand_over(self, model: Any, weights: Weights, step: int) -> None:
        """Give it to the engine; called by each pod's leader. Raises Fault(EngineFailed) when it does not take it."""
        ...


class Adapter:
    """The engine keeps the base, and takes each step's adapter in the place of the last."""

    def __init__(self, model: Any, root: Path, wire: Wire):
        lora = model.peft_config[ADAPTER]
        see_plain(lora)
        self.rank = max(lora.r, *lora.rank_pattern.values(), 1)
        self.name = ROLLOUT_MODEL
        self._root = root
        self._wire = wire

    def gather(self, model: Any, leader: bool) -> Weights:
        """See Handing."""
        return gathering.gather(model, leader, trainable=True, dtype=None)

    def hand_over(self, model: Any, weights: Weights, step: int) -> None:
        """See Handing."""
        if self.name != ROLLOUT_MODEL:
            self._wire.unload(self.name)
            shutil.rmtree(self._root / self.name)
        self.name = step_name(step)
        write_adapter(model, weights, self._root / self.name)
        self._wire.load(self.name, self._root / self.name)


class Whole:
    """The engine reads all weights anew."""

    rank = 0
    name = ROLLOUT_MODEL

    def __init__(self, root: Path, wire: Wire, dtype: torch.dtype):
        self._root = root
        self._wire = wire
        self._dtype = dtype

    def gather(self, model: Any, leader: bool) -> Weights:
        """See Handing."""
        found = gathering.gather(model, leader, trainable=False, dtype=self._dtype)
        return {name: weight for name, weight in found.items() if not name.startswith(f"{VALUE_HEAD}.")}

    def hand_over(self, model: Any, weights: Weights, step: int) -> None:
        """See Handing."""
        folder = self._root / step_name(step)
        model.save_pretrained(folder, max_shard_size="5GB", state_dict=weights)
        self._wire.reload(folder)
        # They are as large as the model.
        shutil.rmtree(folder)


def handing(model: Any, root: Path, wire: Wire, dtype: torch.dtype) -> Handing:
    """The way for this model."""
    return Adapter(model, root, wire) if is_adapted(model) else Whole(root, wire, dtype)


def step_name(step: int) -> str:
    """What the weights of a step are called."""
    return f"step-{step}"


def see_plain(lora: Any) -> None:
    """Raise Fault(SpecInvalid) for an adapter that goes on and is more than the engine takes; rules see the others."""
    if lora.use_dora or lora.bias != "none" or lora.modules_to_save or lora.target_parameters:
        raise Fault(
            Reason.SPEC_INVALID,
            "tuner.continueFrom: the adapter has more than factors of whole layers, and the engine takes no other",
            "Set rollout.engine: transformers.",
        )


def write_adapter(model: Any, weights: Weights, folder: Path) -> None:
    """An adapter's files as PEFT has them, from its gathered weights. Whatever else is trained is left out."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    found = get_peft_model_state_dict(model, weights, adapter_name=ADAPTER, save_embedding_layers=False)
    save_file({name: weight.contiguous() for name, weight in found.items()}, folder / WEIGHTS)
    model.peft_config[ADAPTER].save_pretrained(str(folder))
