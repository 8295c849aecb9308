"""What a method makes its trainer of: everything that the rooms before it prepared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_trainer.data.opened import Media
from trimtab_trainer.data.streaming import Stream
from trimtab_trainer.distributed import Group
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.template import ChatTemplate


@dataclass(frozen=True)
class Parts:
    """The parts of a trainer."""

    config: RunConfig
    group: Group
    model: Any
    """The model, wrapped with its adapter when there is one."""
    tokenizer: Any
    template: ChatTemplate | None
    """The effective chat template; None when neither rows nor model have one."""
    stops: list[int]
    """Ids of the tokens that end an answer."""
    train: Any
    """datasets.Dataset with the columns that the method's encoder wrote."""
    validation: Any
    """The same of the validation rows, or None."""
    folder: Path
    """Where checkpoints are written before they are uploaded."""
    callbacks: list[Any]
    """transformers callbacks: preemption, checkpoints, progress."""
    base: LocalModel | None = None
    """The model as it was before this job; None when it began from random weights."""
    stream: Stream | None = None
    """Records of this process that are read while the training runs; train holds the first of them then."""
    processor: Any = None
    """Of a model with senses; None for one that reads alone."""
    media: Media | None = None
    """What rows show; None when none shows anything."""
    further: dict[str, LocalModel] = field(default_factory=dict)
    """The models beside the tuned one (references, teachers, rewards), by field; they lie in this pod."""
