"""Where a run is told of, beside the resource's own status: experiment trackers that people already look at."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimtab_api.schema import Model, Rule, rules
from trimtab_api.v1alpha1.source import ObjectName

Server = Annotated[
    str,
    Field(
        max_length=512,
        json_schema_extra=rules(
            Rule(
                r"self.matches('^https?://[^/@?#\\s]+(/[^@?#\\s]*)?$')",
                "must be http://HOST:PORT or https://HOST:PORT, with a path if it has one; keys belong into the Secret "
                "that credentials names",
            )
        ),
    ),
]
"""URL of a tracker."""


class TrackerCredentials(Model):
    """The Secret with a tracker's keys. They are mounted into the one pod that reports, as files."""

    secret_name: ObjectName
    """Secret in the namespace of the job: WANDB_API_KEY for Weights & Biases; MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, for MLflow. Other keys are never mounted."""


class Wandb(Model):
    """A run in Weights & Biases, under the UID of the job: attempts go on in it."""

    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_. -]+$")]
    """Project of the run."""
    entity: Annotated[str | None, Field(max_length=128, pattern=r"^[A-Za-z0-9_. -]+$")] = None
    """User or team that the project belongs to; by default the key's own."""
    server: Server | None = None
    """URL of an installation of your own; by default the public one."""
    credentials: TrackerCredentials
    """The Secret with WANDB_API_KEY."""


class Mlflow(Model):
    """A run in MLflow, tagged with the UID of the job: attempts go on in it."""

    server: Server
    """URL of the tracking server."""
    experiment: Annotated[str, Field(min_length=1, max_length=256)]
    """Experiment of the run; made if there is none."""
    credentials: TrackerCredentials | None = None
    """The Secret with the server's keys, if it asks for any."""


class Reports(Model):
    """Trackers that are told of the run. One that cannot be reached costs the run a line in its log, and nothing else."""

    wandb: Wandb | None = None
    """Weights & Biases."""
    mlflow: Mlflow | None = None
    """MLflow."""
