"""From object storage into a folder: parallel ranges, verified while they are written, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trimtab_store.connection import S3
from trimtab_store.progress import Progress


def fetch(
    s3: S3,
    uri: str,
    into: Path,
    *,
    expected_digest: str | None = None,
    only: Iterable[str] | None = None,
    foreign: bool = False,
    progress: Progress | None = None,
) -> str:
    """Bring the artifact at `uri` into the folder `into`, which appears complete or not at all; returns its digest.

    `only`: glob patterns of the paths wanted. `foreign`: take a prefix without manifest as it is listed.
    Raises NotAnArtifact, DigestMismatch, ShortRead, ObjectMissing, DiskFull, UnsafePath, StorageUnreachable, ...
    """
    raise NotImplementedError
