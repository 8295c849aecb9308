"""What the installation decides: images, default storage, namespaces, limits. One file, written by the chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trimtab_api.schema import Model
from trimtab_api.v1alpha1.pod import ResourceAmounts
from trimtab_api.v1alpha1.source import Storage


class Images(Model):
    """The images of what the operator starts; each thing keeps the one that it was started with."""

    trainer: str
    """Trains, checks inputs, merges."""
    server: str
    """Serves."""


class Preflight(Model):
    """The pod that looks at a FineTuneJob's inputs."""

    resources: ResourceAmounts = Field(
        default_factory=lambda: ResourceAmounts(requests={"cpu": "250m", "memory": "1Gi"}, limits={"memory": "4Gi"})
    )
    """Resources of the pod."""


class Rewards(Model):
    """What answers may be judged by."""

    python: bool = False
    """Whether jobs may name functions of their own, which run in the trainer's pods."""


class Settings(Model):
    """The settings file."""

    images: Images
    """The images of what the operator starts."""
    storage: Storage | None = None
    """The object storage of resources that name none."""
    output: str | None = None
    """s3://BUCKET/PREFIX for results of resources that name none."""
    namespaces: list[str] = Field(default_factory=list)
    """Namespaces to work in; an empty list is every one."""
    preflight: Preflight = Field(default_factory=Preflight)
    """The pod that looks at a FineTuneJob's inputs."""
    rewards: Rewards = Field(default_factory=Rewards)
    """What answers may be judged by."""
    image_pull_secrets: list[str] = Field(default_factory=list)
    """Names of Secrets with registry credentials, in the namespaces of the jobs."""
    workers: Annotated[int, Field(ge=1, le=64)] = 4
    """Resources that are worked on at the same time."""
    resync_seconds: Annotated[int, Field(ge=10)] = 300
    """Seconds after which every resource is looked at again, whether or not anything was seen to change."""
    start_timeout_seconds: Annotated[int, Field(ge=10)] = 300
    """Seconds after which a gang that is not complete is said to be refused or unschedulable."""
    log_level: str = "info"
    """debug, info, warning or error."""


def load(path: Path) -> Settings:
    """Read the settings file.

    Raises OSError when it cannot be read and pydantic.ValidationError when a value is wrong.
    """
    return Settings.model_validate(json.loads(path.read_text()))
