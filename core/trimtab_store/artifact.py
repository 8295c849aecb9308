"""Artifacts: prefixes that exist because a manifest, written last, says what they hold."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pydantic import ValidationError

from trimtab_api.contract import MANIFEST_NAME, Manifest, ManifestFile
from trimtab_store.connection import S3, ObjectInfo
from trimtab_store.errors import DigestMismatch, NotAnArtifact, ObjectMissing, UnsafePath
from trimtab_store.location import join, parse_uri

_LOG = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint that is complete."""

    step: int
    uri: str
    digest: str


class ForeignFile(NamedTuple):
    """A file that no manifest of ours vouches for: its version is its ETag."""

    path: str
    size: int
    etag: str


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
    foreign: tuple[ForeignFile, ...] = ()
    """The files of what was not published by us."""
    single: bool = False
    """The uri is one object, not a prefix."""


def read_manifest(s3: S3, uri: str) -> Manifest:
    """The manifest of an artifact, its paths checked. Raises NotAnArtifact, UnsafePath, BucketMissing, ..."""
    place = join(uri, MANIFEST_NAME)
    try:
        text = s3.get_object(place)
    except ObjectMissing as error:
        problem = f"there is no {MANIFEST_NAME}, so nothing says that it is complete"
        raise NotAnArtifact(uri, problem, "name an artifact's prefix, or wait for its upload") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"this is no manifest of ours ({field}: {first['msg']})"
        raise NotAnArtifact(place, problem, "publish it again, or remove the file") from error
    check_paths(uri, (file.path for file in manifest.files))
    return manifest


def write_manifest(s3: S3, uri: str, files: Iterable[ManifestFile], made_by: dict[str, Any]) -> Manifest:
    """See that each file is in place with its size, then write manifest.json: from now on the artifact exists.

    Raises ObjectMissing or DigestMismatch for a file that is not there as told, UnsafePath, ...
    """
    listed = sorted(files, key=lambda file: file.path)
    check_paths(uri, (file.path for file in listed))
    _check_in_place(s3, uri, listed)
    encoded = Manifest(files=listed, made_by=made_by).encoded()
    # Read back, so that the digest given here is the one that every reader computes.
    manifest = Manifest.model_validate_json(encoded)
    s3.put_object(join(uri, MANIFEST_NAME), manifest.encoded())
    return manifest


def retract(s3: S3, uri: str) -> None:
    """Delete manifest.json: the prefix no longer exists as an artifact and may be written anew."""
    s3.delete_object(join(uri, MANIFEST_NAME))


def find_checkpoints(s3: S3, prefix: str) -> list[Checkpoint]:
    """The complete checkpoints below `prefix`, newest first."""
    found = []
    for folder in s3.list_folders(prefix):
        name = PurePosixPath(parse_uri(folder).key).name
        if not name.isdecimal():
            continue
        try:
            found.append(Checkpoint(int(name), folder, read_manifest(s3, folder).digest))
        except (NotAnArtifact, UnsafePath) as error:
            # An upload that was cut off leaves just this; older checkpoints are no worse for it.
            _LOG.info("passed over a checkpoint: %s", error)
    return sorted(found, reverse=True)


def identify(s3: S3, uri: str) -> Identity:
    """What stands at `uri` now, without reading content. Raises ObjectMissing when nothing does."""
    try:
        manifest = read_manifest(s3, uri)
    except NotAnArtifact as error:
        if not isinstance(error.__cause__, ObjectMissing):
            raise
        return _identify_foreign(s3, uri)
    return Identity(manifest.digest, manifest.size, tuple(file.path for file in manifest.files), manifest)


def _identify_foreign(s3: S3, uri: str) -> Identity:
    root = parse_uri(uri)
    found = [_foreign(info, root.folder) for info in s3.list(uri) if not info.uri.endswith("/")]
    single = not found and bool(root.key) and not uri.endswith("/")
    if single:
        info = s3.stat(uri)
        found = [ForeignFile(PurePosixPath(root.key).name, info.size, info.etag)]
    if not found:
        raise ObjectMissing(uri, "there is no object below this prefix", "upload it, or correct the uri")
    found.sort()
    check_paths(uri, (file.path for file in found))
    text = json.dumps([list(file) for file in found], separators=(",", ":"), ensure_ascii=False)
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    paths = tuple(file.path for file in found)
    return Identity(digest, sum(file.size for file in found), paths, None, tuple(found), single)


def _foreign(info: ObjectInfo, folder: str) -> ForeignFile:
    return ForeignFile(parse_uri(info.uri).key.removeprefix(folder), info.size, info.etag)


def _check_in_place(s3: S3, uri: str, files: list[ManifestFile]) -> None:
    folder = parse_uri(uri).folder
    there = {parse_uri(info.uri).key.removeprefix(folder): info.size for info in s3.list(uri)}
    for file in files:
        if file.path not in there:
            raise ObjectMissing(join(uri, file.path), "the upload did not arrive", "upload it again")
        if there[file.path] != file.size:
            problem = f"{there[file.path]} bytes arrived of {file.size}"
            raise DigestMismatch(join(uri, file.path), problem, "upload it again")


def check_paths(uri: str, paths: Iterable[str]) -> None:
    """Raise UnsafePath unless every path stays below its folder and all of them can be files side by side."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if flaw := _flaw(path, seen):
            raise UnsafePath(uri, f"path {path!r} {flaw}", "publish it again from a clean folder")
        seen.add(path)
        folders.update(str(above) for above in PurePosixPath(path).parents)
    if both := sorted(seen & folders):
        raise UnsafePath(uri, f"path {both[0]!r} is a file and a folder", "publish it again from a clean folder")


def _flaw(path: str, seen: set[str]) -> str | None:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts:
        return "leaves the folder"
    if "" in parts or "." in parts or "\0" in path:
        return "cannot be a file's"
    if len(path.encode()) > 1024 or any(len(part.encode()) > 255 for part in parts):
        return "is too long for a file system"
    if path == MANIFEST_NAME:
        return "is the manifest's own"
    return "is there twice" if path in seen else None
