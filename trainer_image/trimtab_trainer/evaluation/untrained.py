"""What stands in a trainer's place where nothing is trained: a model on its device, a precision, and a history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainingArguments

from trimtab_api.contract import RunConfig
from trimtab_trainer.arguments import UnnumberedCpu, common


class Arguments(UnnumberedCpu, TrainingArguments):
    """TrainingArguments for runs on any device."""


def untrained(config: RunConfig, model: Any, folder: Path, callbacks: Sequence[Any]) -> Trainer:
    """A trainer that an evaluation can ask, and that is never told to train."""
    trainer = Trainer(model=model, args=Arguments(**common(config, folder, validated=False)), callbacks=[*callbacks])
    trainer.remove_callback(PrinterCallback)
    return trainer
