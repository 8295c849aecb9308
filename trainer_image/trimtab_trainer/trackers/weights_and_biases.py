"""A run in Weights & Biases. Its id is the UID of the job, so that each attempt goes on where the last one ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.reports import Wandb
from trimtab_trainer.trackers.tracker import Keys, parameters

TIMEOUT_SECONDS = 60.0
"""Longest wait for the server when the run is made."""


class WeightsAndBiases:
    """See tracker.Tracker."""

    def __init__(self, spec: Wandb, config: RunConfig, keys: Keys, folder: Path):
        self._spec = spec
        self._config = config
        self._keys = keys
        self._folder = folder
        self._run: Any = None

    @property
    def place(self) -> str:
        """See tracker.Tracker."""
        return f"Weights & Biases, project {self._spec.project}"

    def begin(self) -> None:
        """See tracker.Tracker."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(variable, str(self._folder))
        import wandb

        job = self._config.job
        self._run = wandb.init(
            project=self._spec.project,
            entity=self._spec.entity,
            id=job.uid,
            name=f"{job.namespace}/{job.name}",
            job_type=self._config.spec.method,
            resume="allow",
            dir=str(self._folder),
            config=dict(parameters(self._config)),
            settings=self._settings(wandb),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See tracker.Tracker. Steps that an earlier attempt told already are passed over by the server."""
        self._run.log(dict(values), step=step)

    def end(self, whole: bool) -> None:
        """See tracker.Tracker."""
        if not whole:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if whole else 1)

    def _settings(self, wandb: Any) -> Any:
        given = {"base_url": self._spec.server, "api_key": self._keys.get("WANDB_API_KEY")}
        return wandb.Settings(
            # Numbers alone: nothing of the program, of what it prints, or of the computer's packages.
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            silent=True,
            init_timeout=TIMEOUT_SECONDS,
            **{name: value for name, value in given.items() if value is not None},
        )
