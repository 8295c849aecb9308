"""Where results go: a prefix in object storage, or a folder of the same layout when there is no cluster."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import (
    MANIFEST_NAME,
    CheckpointReport,
    Layout,
    Manifest,
    ManifestFile,
    OutputTarget,
)
from trimtab_store.errors import NotAnArtifact
from trimtab_trainer.endings import Fault


class Output(Protocol):
    """The verbs on results. A prefix is what Layout names; nothing below it exists until its manifest does."""

    layout: Layout

    def upload(self, folder: Path, prefix: str, files: Iterable[str]) -> list[ManifestFile]:
        """Send some files of a folder; each rank calls it for its own."""
        ...

    def seal(self, prefix: str, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """Write the manifest: from now on the prefix exists."""
        ...

    def retract(self, prefix: str) -> None:
        """Take the manifest away, so that the prefix may be written anew."""
        ...

    def find(self, prefix: str) -> Manifest | None:
        """The manifest of a prefix, None when there is none."""
        ...

    def fetch(self, prefix: str, into: Path, digest: str | None = None) -> Path:
        """The whole prefix, verified, as a local folder that may be read."""
        ...

    def checkpoints(self) -> list[CheckpointReport]:
        """Complete checkpoints of this run, newest first."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete everything below a prefix."""
        ...

    def probe(self) -> None:
        """Write and delete a small object, so that refusal is known before the work."""
        ...


def open_output(target: OutputTarget, patience: float = 120.0) -> Output:
    """The output that a run was told to use.

    Raises Fault(OutputMissing) when there is none, and the store's errors for a connection that cannot be.
    """
    if target.s3 is not None:
        return S3Output(store.connect(target.s3.connection, patience=patience), target.s3.uri)
    if target.path is not None:
        return FolderOutput(Path(target.path))
    raise Fault(Reason.OUTPUT_MISSING, "the run has no output")


def publish(output: Output, folder: Path, prefix: str, made_by: dict[str, Any]) -> Manifest:
    """Upload a whole folder below a prefix and seal it."""
    output.retract(prefix)
    return output.seal(prefix, output.upload(folder, prefix, files_of(folder)), made_by)


def files_of(folder: Path) -> list[str]:
    """Every file of a folder but a manifest, by path below it."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST_NAME)


class S3Output:
    """A prefix in object storage."""

    def __init__(self, s3: store.S3, prefix: str):
        self.layout = Layout(prefix=prefix.rstrip("/"))
        self._s3 = s3

    def upload(self, folder: Path, prefix: str, files: Iterable[str]) -> list[ManifestFile]:
        """See Output."""
        return store.upload_files(self._s3, folder, prefix, files=files)

    def seal(self, prefix: str, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """See Output."""
        return store.write_manifest(self._s3, prefix, files, made_by)

    def retract(self, prefix: str) -> None:
        """See Output."""
        store.retract(self._s3, prefix)

    def find(self, prefix: str) -> Manifest | None:
        """See Output."""
        try:
            return store.read_manifest(self._s3, prefix)
        except NotAnArtifact:
            return None

    def fetch(self, prefix: str, into: Path, digest: str | None = None) -> Path:
        """See Output."""
        store.fetch(self._s3, prefix, into, expected_digest=digest)
        return into

    def checkpoints(self) -> list[CheckpointReport]:
        """See Output."""
        found = store.find_checkpoints(self._s3, self.layout.checkpoints)
        return [CheckpointReport(step=each.step, uri=each.uri, digest=each.digest) for each in found]

    def delete(self, prefix: str) -> None:
        """See Output."""
        self._s3.delete_prefix(prefix)

    def probe(self) -> None:
        """See Output."""
        uri = f"{self.layout.prefix}/.probe"
        self._s3.put_object(uri, b"")
        self._s3.delete_object(uri)


class FolderOutput:
    """A folder on this computer."""

    def __init__(self, root: Path):
        self.layout = Layout(prefix=str(root.absolute()))

    def upload(self, folder: Path, prefix: str, files: Iterable[str]) -> list[ManifestFile]:
        """See Output."""
        return [_copy(folder / name, Path(prefix) / name, name) for name in files]

    def seal(self, prefix: str, files: list[ManifestFile], made_by: dict[str, Any]) -> Manifest:
        """See Output."""
        manifest = Manifest(files=sorted(files, key=lambda file: file.path), made_by=made_by)
        path = Path(prefix) / MANIFEST_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(manifest.encoded())
        temporary.replace(path)
        return manifest

    def retract(self, prefix: str) -> None:
        """See Output."""
        (Path(prefix) / MANIFEST_NAME).unlink(missing_ok=True)

    def find(self, prefix: str) -> Manifest | None:
        """See Output."""
        path = Path(prefix) / MANIFEST_NAME
        return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None

    def fetch(self, prefix: str, into: Path, digest: str | None = None) -> Path:
        """See Output. The folder itself is read in place, after its files were held against the manifest."""
        manifest = self.find(prefix)
        if manifest is None:
            raise Fault(Reason.NOT_AN_ARTIFACT, f"{prefix}: no {MANIFEST_NAME}")
        if digest not in (None, manifest.digest):
            raise Fault(Reason.DIGEST_MISMATCH, f"{prefix}: the manifest is {manifest.digest}, wanted {digest}")
        for file in manifest.files:
            path = Path(prefix) / file.path
            if not path.is_file() or _digest(path) != file.sha256:
                raise Fault(Reason.DIGEST_MISMATCH, f"{path}: not what the manifest says")
        return Path(prefix)

    def checkpoints(self) -> list[CheckpointReport]:
        """See Output."""
        folder = Path(self.layout.checkpoints)
        names = sorted((path.name for path in folder.iterdir()), reverse=True) if folder.is_dir() else []
        found = [(name, self.find(f"{folder}/{name}")) for name in names if name.isdigit()]
        return [
            CheckpointReport(step=int(name), uri=f"{folder}/{name}", digest=manifest.digest)
            for name, manifest in found
            if manifest is not None
        ]

    def delete(self, prefix: str) -> None:
        """See Output."""
        self.retract(prefix)
        shutil.rmtree(prefix, ignore_errors=False) if Path(prefix).is_dir() else None

    def probe(self) -> None:
        """See Output."""
        path = Path(self.layout.prefix) / ".probe"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.unlink()


def _copy(source: Path, target: Path, name: str) -> ManifestFile:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
    return ManifestFile(path=name, size=target.stat().st_size, sha256=_digest(target))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
