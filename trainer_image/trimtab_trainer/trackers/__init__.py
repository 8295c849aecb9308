"""Experiment trackers that are told of a run, each from a thread of its own: none can end it, or keep it waiting."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trimtab_api import contract
from trimtab_api.contract import RunConfig
from trimtab_trainer.progress import Reporter
from trimtab_trainer.trackers.telling import Telling
from trimtab_trainer.trackers.tracker import Keys, Tracker


def of(config: RunConfig, work: Path, keys_root: Path = Path(contract.TRACKERS_ROOT)) -> list[Reporter]:
    """The trackers that the spec names. `work`: where they may write."""
    return [Telling(tracker) for tracker in _named(config, work, keys_root)]


def _named(config: RunConfig, work: Path, keys_root: Path) -> Iterable[Tracker]:
    reports = config.spec.reports
    if reports.wandb is not None:
        from trimtab_trainer.trackers.weights_and_biases import WeightsAndBiases

        yield WeightsAndBiases(reports.wandb, config, _keys(keys_root / "wandb", contract.WANDB_KEYS), work / "wandb")
    if reports.mlflow is not None:
        from trimtab_trainer.trackers.mlflow_run import MlflowRun

        yield MlflowRun(reports.mlflow, config, _keys(keys_root / "mlflow", contract.MLFLOW_KEYS))


def _keys(folder: Path, names: Iterable[str]) -> Keys:
    """The keys of a tracker: files of a Secret, or where there is no cluster the environment."""
    if folder.is_dir():
        return {name: (folder / name).read_text().strip() for name in names if (folder / name).is_file()}
    return {name: os.environ[name] for name in names if name in os.environ}
