"""From a folder into object storage: parallel, multi-part, each file read once, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimtab_api.contract import Manifest, ManifestFile
from trimtab_store.connection import S3
from trimtab_store.progress import Progress


def upload_files(
    s3: S3, folder: Path, uri: str, *, files: Iterable[str] | None = None, progress: Progress | None = None
) -> list[ManifestFile]:
    """Upload files of `folder` (all, or the relative paths in `files`) below `uri`; returns them in order of path.

    Raises LocalFileFailed, AccessDenied, StorageUnreachable, ... ; parts already sent are then thrown away.
    """
    raise NotImplementedError


def publish(
    s3: S3,
    folder: Path,
    uri: str,
    made_by: dict[str, Any],
    *,
    files: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make `folder` the artifact at `uri`: retract what was there, upload, write the manifest last."""
    raise NotImplementedError
