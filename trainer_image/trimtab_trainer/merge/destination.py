"""Where the merged model goes. Each file is remembered as it is finished, so that another pod can go on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import MANIFEST_NAME, Layout, Manifest, ManifestFile, S3Place
from trimtab_api.schema import Model
from trimtab_store.errors import NotAnArtifact, ObjectMissing
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.places import Folder, LocalFolder, S3Folder

FINGERPRINT = "fingerprint"
"""Key of made_by that tells what the merge was made of."""


class Partial(Model):
    """What an unfinished merge has done."""

    fingerprint: str
    """What it was made of; the work of another merge is of no use."""
    files: list[ManifestFile]
    """Files that are in place."""
    checked: list[str]
    """Files of the base whose content was held against its manifest."""


class Destination(Protocol):
    """The folder or prefix of one merged model."""

    @property
    def uri(self) -> str:
        """Where the artifact will be."""
        ...

    @property
    def stage(self) -> Path:
        """Where files are written before they are stored."""
        ...

    @property
    def hashes(self) -> bool:
        """Whether `store` computes the digest by itself."""
        ...

    def finished(self, fingerprint: str) -> Manifest | None:
        """The manifest, when this very merge was completed before."""
        ...

    def resume(self, fingerprint: str) -> Partial:
        """What an earlier process of this very merge left; everything else that was left is removed."""
        ...

    def store(self, name: str, sha256: str | None) -> ManifestFile:
        """Bring a staged file into place."""
        ...

    def remember(self, partial: Partial) -> None:
        """Note what is done."""
        ...

    def forget(self) -> None:
        """Give up what is done."""
        ...

    def folder(self, files: Iterable[ManifestFile]) -> Folder:
        """What is in place, to be read back."""
        ...

    def seal(self, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """Write the manifest: from now on the model exists."""
        ...


class S3Destination:
    """A prefix in object storage."""

    hashes = True

    def __init__(self, place: S3Place, stage: Path):
        layout = Layout(prefix=place.uri.rstrip("/"))
        self.uri = layout.artifact
        self.stage = stage
        self._place = place
        self._record = f"{layout.prefix}/merge.partial.json"
        self._s3 = store.connect(place.connection)

    def finished(self, fingerprint: str) -> Manifest | None:
        """See Destination."""
        try:
            manifest = store.read_manifest(self._s3, self.uri)
        except NotAnArtifact:
            return None
        return manifest if manifest.made_by.get(FINGERPRINT) == fingerprint else None

    def resume(self, fingerprint: str) -> Partial:
        """See Destination."""
        try:
            partial = _partial(self._s3.get_object(self._record), fingerprint)
        except ObjectMissing:
            partial = _partial(b"", fingerprint)
        there = {info.uri: info.size for info in self._s3.list(self.uri)}
        kept = [file for file in partial.files if there.get(f"{self.uri}/{file.path}") == file.size]
        names = {f"{self.uri}/{file.path}" for file in kept}
        store.retract(self._s3, self.uri)
        for uri in there:
            if uri not in names:
                self._s3.delete_object(uri)
        return partial.model_copy(update={"files": kept})

    def store(self, name: str, sha256: str | None) -> ManifestFile:
        """See Destination."""
        (file,) = store.upload_files(self._s3, self.stage, self.uri, files=[name])
        (self.stage / name).unlink()
        return file

    def remember(self, partial: Partial) -> None:
        """See Destination."""
        self._s3.put_object(self._record, partial.model_dump_json(by_alias=True).encode())

    def forget(self) -> None:
        """See Destination."""
        self._s3.delete_object(self._record)

    def folder(self, files: Iterable[ManifestFile]) -> Folder:
        """See Destination."""
        place = S3Place(uri=self.uri, connection=self._place.connection)
        return S3Folder(place)

    def seal(self, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """See Destination."""
        manifest = store.write_manifest(self._s3, self.uri, files, made_by)
        self.forget()
        return manifest


class FolderDestination:
    """A folder on this computer."""

    hashes = False

    def __init__(self, root: Path):
        self.uri = str(root)
        self.stage = root / ".partial"
        self._root = root
        self._record = self.stage / "merge.json"

    def finished(self, fingerprint: str) -> Manifest | None:
        """See Destination. Raises Fault when something else is there."""
        path = self._root / MANIFEST_NAME
        if path.is_file():
            manifest = Manifest.model_validate_json(path.read_bytes())
            if manifest.made_by.get(FINGERPRINT) == fingerprint:
                return manifest
        if self._root.is_dir() and not self.stage.is_dir() and any(self._root.iterdir()):
            hint = "Choose an empty folder, or remove what is there."
            raise Fault(Reason.SPEC_INVALID, f"the output {self._root} is not empty", hint)
        return None

    def resume(self, fingerprint: str) -> Partial:
        """See Destination."""
        self.stage.mkdir(parents=True, exist_ok=True)
        partial = _partial(self._record.read_bytes() if self._record.is_file() else b"", fingerprint)
        kept = [file for file in partial.files if _size(self._root / file.path) == file.size]
        names = {file.path for file in kept}
        for path in [*self._root.glob("*"), *self.stage.glob("*")]:
            if path.is_file() and path.name not in names and path != self._record:
                path.unlink()
        return partial.model_copy(update={"files": kept})

    def store(self, name: str, sha256: str | None) -> ManifestFile:
        """See Destination."""
        staged = self.stage / name
        if sha256 is None:
            with staged.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
        return ManifestFile(path=name, size=target.stat().st_size, sha256=sha256)

    def remember(self, partial: Partial) -> None:
        """See Destination."""
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(partial.model_dump_json(by_alias=True))
        temporary.replace(self._record)

    def forget(self) -> None:
        """See Destination."""
        self._record.unlink(missing_ok=True)

    def folder(self, files: Iterable[ManifestFile]) -> Folder:
        """See Destination."""
        return LocalFolder(self._root, self.uri)

    def seal(self, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """See Destination."""
        manifest = Manifest(files=sorted(files, key=lambda file: file.path), made_by=made_by)
        temporary = self.stage / MANIFEST_NAME
        temporary.write_bytes(manifest.encoded())
        temporary.replace(self._root / MANIFEST_NAME)
        shutil.rmtree(self.stage)
        return manifest


def _partial(content: bytes, fingerprint: str) -> Partial:
    """The record, when there is one and it is about this merge; else one that says nothing is done."""
    nothing = Partial(fingerprint=fingerprint, files=[], checked=[])
    try:
        found = Partial.model_validate(json.loads(content)) if content else nothing
    except (ValueError, ValidationError):
        return nothing
    return found if found.fingerprint == fingerprint else nothing


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
