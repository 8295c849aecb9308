"""Artifacts: prefixes that exist because a manifest, written last, says what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from trimtab_api.contract import Manifest, ManifestFile
from trimtab_store.connection import S3


class Checkpoint(NamedTuple):
    """A checkpoint that is complete."""

    step: int
    uri: str
    digest: str


class Identity(NamedTuple):
    """What a prefix or object is at this moment."""

    digest: str
    """The manifest's digest; for what has no manifest, sha256 over paths, sizes and ETags."""
    size: int
    """Bytes of all files together."""
    files: tuple[str, ...]
    """Paths below the prefix; the object's own name when the uri is one object."""
    manifest: Manifest | None
    """None for what was not published by us."""


def read_manifest(s3: S3, uri: str) -> Manifest:
    """The manifest of an artifact, its paths checked. Raises NotAnArtifact, UnsafePath, BucketMissing, ..."""
    raise NotImplementedError


def write_manifest(s3: S3, uri: str, files: Iterable[ManifestFile], made_by: dict[str, Any]) -> Manifest:
    """See that each file is in place with its size, then write manifest.json: from now on the artifact exists.

    Raises ObjectMissing or ShortRead for a file that is not there as told, UnsafePath, ...
    """
    raise NotImplementedError


def retract(s3: S3, uri: str) -> None:
    """Delete manifest.json: the prefix no longer exists as an artifact and may be written anew."""
    raise NotImplementedError


def find_checkpoints(s3: S3, prefix: str) -> list[Checkpoint]:
    """The complete checkpoints below `prefix`, newest first."""
    raise NotImplementedError


def identify(s3: S3, uri: str) -> Identity:
    """What stands at `uri` now, without reading content. Raises ObjectMissing when nothing does."""
    raise NotImplementedError
