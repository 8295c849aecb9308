"""Where a job's results go."""

from __future__ import annotations

from trimtab_api.schema import (
    Model,
)
from trimtab_api.v1alpha1.source import S3Uri, Storage


class Output(Model):
    """Where checkpoints and the artifact go."""

    uri: S3Uri | None = None
    """s3://BUCKET/PREFIX; the job writes below PREFIX/NAMESPACE/NAME/UID. By default the installation's."""
    storage: Storage | None = None
    """How to reach it, when it differs from the resource's own `storage`."""
