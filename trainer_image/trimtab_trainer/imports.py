"""What a process does without: libraries that others load whenever they are installed, used or not.

transformers, PEFT and accelerate import what they find beside them. It was a third of a rank's start; of a merge two
seconds and a quarter of a gigabyte, before the first byte of a model was read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimtab_api.contract import ModelInput, RunConfig
from trimtab_trainer.model import quantisation

WITHOUT_BITSANDBYTES = ("adamw", "adafactor", "sgd")
"""Optimisers that are not of bitsandbytes."""
UNUSED_BY_MERGES = ("bitsandbytes", "scipy", "sklearn", "torchvision", "triton")
"""Quantised layers, losses of object detection, assisted generation, pictures, kernels of GPUs."""
MEASURED = ("sequenceClassification", "embedding", "reranker")
"""Methods whose metrics are scikit-learn's and SciPy's; sentence-transformers imports both."""


def leave_out(names: Iterable[str]) -> None:
    """Let the libraries that are not loaded yet pass for not installed, in this process.

    None in sys.modules is how the language says that a module is not there: importing it raises
    ModuleNotFoundError, and importlib.util.find_spec, which libraries ask first, finds nothing.
    """
    modules: dict[str, Any] = sys.modules
    for name in names:
        modules.setdefault(name, None)


def unused(config: RunConfig) -> list[str]:
    """The libraries that this run has no use for. In doubt a library is kept."""
    if config.code:  # the user's own code may import whatever the image holds
        return []
    spec, names = config.spec, []
    if spec.method not in MEASURED:
        # Assisted generation and the losses of object detection are what transformers takes them for.
        names += ["sklearn", "scipy"]
    if not config.resolved.strategy.startswith("zero"):
        names.append("deepspeed")
    plain = spec.model.quantization is None and spec.training.optimizer in WITHOUT_BITSANDBYTES
    if plain and all(_known_unquantised(each) for each in (config.model, *config.further) if each is not None):
        names.append("bitsandbytes")
    # Beside our own trackers, only DeepSpeed's tuner and TRL's tables look for them.
    trackers = {"mlflow": spec.reports.mlflow, "wandb": spec.reports.wandb}
    return [*names, *(name for name, asked in trackers.items() if asked is None)]


def _known_unquantised(source: ModelInput) -> bool:
    """Its config.json is here and says so; a model that must be fetched first is not known yet."""
    described = None if source.path is None else Path(source.path) / "config.json"
    if described is None or not described.is_file():
        return False
    try:
        return quantisation.method(json.loads(described.read_bytes())) is None
    except ValueError:
        return False
