"""A run in MLflow. It carries the UID of the job as a tag, so that each attempt goes on in the run of the first."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.reports import Mlflow
from trimtab_trainer.trackers.tracker import Keys, parameters

UID_TAG = "trimtab.dev/uid"
PARAMETERS_AT_ONCE = 100
"""The server's limit for one request."""
PARAMETER_LIMIT = 6000
"""Longest text of a parameter, in characters."""
_SETTINGS = {
    # Of the library: how long and how often it asks. We are in a thread, and ask again at the next step.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowRun:
    """See tracker.Tracker."""

    def __init__(self, spec: Mlflow, config: RunConfig, keys: Keys):
        self._spec = spec
        self._config = config
        self._keys = keys
        self._client: Any = None
        self._run_id = ""

    @property
    def place(self) -> str:
        """See tracker.Tracker."""
        return f"MLflow, experiment {self._spec.experiment}"

    def begin(self) -> None:
        """See tracker.Tracker. Raises RuntimeError when a Secret is named that holds none of the documented keys."""
        if self._spec.credentials is not None and not self._keys:
            raise RuntimeError(
                f"Secret {self._spec.credentials.secret_name} is not there or holds neither MLFLOW_TRACKING_TOKEN nor "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        # The library takes keys from the environment alone.
        os.environ.update({**_SETTINGS, **self._keys})
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._spec.server)
        self._run_id = self._known() or self._made()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See tracker.Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def end(self, whole: bool) -> None:
        """See tracker.Tracker."""
        self._client.set_terminated(self._run_id, status="FINISHED" if whole else "KILLED")

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._spec.experiment)
        return str(found.experiment_id if found is not None else self._client.create_experiment(self._spec.experiment))

    def _known(self) -> str | None:
        wanted = f"tags.`{UID_TAG}` = '{self._config.job.uid}'"
        found = self._client.search_runs([self._experiment()], wanted, max_results=1)
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _made(self) -> str:
        from mlflow.entities import Param

        job = self._config.job
        tags = {UID_TAG: job.uid, "trimtab.dev/namespace": job.namespace, "trimtab.dev/name": job.name}
        run = self._client.create_run(self._experiment(), run_name=f"{job.namespace}/{job.name}", tags=tags)
        told = [Param(name, text[:PARAMETER_LIMIT]) for name, text in parameters(self._config).items()]
        for first in range(0, len(told), PARAMETERS_AT_ONCE):
            self._client.log_batch(run.info.run_id, params=told[first : first + PARAMETERS_AT_ONCE])
        return str(run.info.run_id)
