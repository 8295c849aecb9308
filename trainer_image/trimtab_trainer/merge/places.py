"""Folders near and far: the same few verbs on a local folder, a prefix in storage and a repository of the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import MANIFEST_NAME, Manifest, ModelInput, S3Place
from trimtab_api.v1alpha1.source import HubModel
from trimtab_store.errors import DigestMismatch
from trimtab_trainer.endings import Fault

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Folder(Protocol):
    """A folder that is read by ranges."""

    @property
    def uri(self) -> str:
        """Logical reference, for messages."""
        ...

    @property
    def digest(self) -> str | None:
        """Identity of the content, when it has one that does not need to read all of it."""
        ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by path."""
        ...

    @property
    def sha256(self) -> Mapping[str, str]:
        """What a manifest says that the files' content is; empty without one."""
        ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of a file. Raises when the file ends before."""
        ...


def read_small(folder: Folder, name: str, limit: int = 64 << 20) -> bytes:
    """The whole of a small file, held against the manifest. Raises Fault when it is too large or another one."""
    size = folder.sizes[name]
    if size > limit:
        raise Fault(Reason.MODEL_INVALID, f"{folder.uri}/{name} has {size} bytes, more than {limit}")
    content = bytearray(size)
    folder.read_into(name, 0, memoryview(content))
    wanted = folder.sha256.get(name)
    if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
        raise wrong_content(folder, name)
    return bytes(content)


def wrong_content(folder: Folder, name: str) -> Fault:
    """The file is not what the manifest says."""
    hint = "Publish the artifact again; nothing of it was used."
    return Fault(Reason.DIGEST_MISMATCH, f"{folder.uri}/{name} is not what the manifest says", hint)


def open_folder(source: ModelInput) -> Folder:
    """The folder that an input names.

    Raises the store's errors, and Fault when it is missing, another one than wanted, or pickled.
    """
    folder: Folder
    if source.s3 is not None:
        folder = S3Folder(source.s3)
    elif source.hugging_face is not None:
        folder = HubFolder(source.hugging_face)
    else:
        folder = LocalFolder(Path(source.path or ""), source.reference)
    refuse_pickles(folder.sizes, f"{source.field} {folder.uri}")
    return folder


def refuse_pickles(names: Mapping[str, int], where: str) -> None:
    """Raise Fault(UnsafeFormat) when there are pickled weights and no others."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        hint = "Save the weights as safetensors; pickled ones are never opened, because that can run code."
        raise Fault(Reason.UNSAFE_FORMAT, f"{where}: {pickles[0]} is pickled and there is no *.safetensors", hint)


class LocalFolder:
    """A folder of this computer or of a mounted volume."""

    def __init__(self, root: Path, reference: str):
        if not root.is_dir():
            raise Fault(Reason.OBJECT_MISSING, f"{reference}: no such folder", "Correct the path.")
        self.uri = reference
        self.root = root
        found = sorted(path for path in root.rglob("*") if path.is_file())
        self.sizes: dict[str, int] = {path.relative_to(root).as_posix(): path.stat().st_size for path in found}
        self.digest, self.sha256 = self._identity()

    def _identity(self) -> tuple[str, dict[str, str]]:
        if MANIFEST_NAME in self.sizes:
            manifest = Manifest.model_validate_json((self.root / MANIFEST_NAME).read_bytes())
            return manifest.digest, {file.path: file.sha256 for file in manifest.files}
        # Reading all of a large model only to name it would double the work: sizes and times must do.
        stamps = [f"{name} {size} {(self.root / name).stat().st_mtime_ns}\n" for name, size in self.sizes.items()]
        return "sha256:" + hashlib.sha256("".join(stamps).encode()).hexdigest(), {}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See Folder."""
        done = 0
        with (self.root / name).open("rb", buffering=0) as stream:
            while done < len(buffer):
                count = os.preadv(stream.fileno(), [buffer[done:]], start + done)
                if count == 0:
                    raise Fault(
                        Reason.MODEL_INVALID, f"{self.uri}/{name} ends at byte {start + done}", "Copy it again."
                    )
                done += count


class S3Folder:
    """A prefix in object storage."""

    def __init__(self, place: S3Place):
        self._s3 = store.connect(place.connection)
        self.uri = place.uri.rstrip("/")
        identity = store.identify(self._s3, self.uri)
        self.digest = identity.digest
        if place.digest is not None and place.digest != identity.digest:
            problem = f"the digest is {identity.digest}, wanted {place.digest}"
            raise DigestMismatch(self.uri, problem, "restore it, or name the version that is there")
        if identity.manifest is not None:
            self.sizes = {file.path: file.size for file in identity.manifest.files}
            self.sha256 = {file.path: file.sha256 for file in identity.manifest.files}
        else:
            start = len(self.uri) + 1
            self.sizes = {info.uri[start:]: info.size for info in self._s3.list(self.uri)}
            self.sha256 = {}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See Folder."""
        self._s3.read_into(f"{self.uri}/{name}", start, buffer)


class HubFolder:
    """A repository of the Hugging Face hub, at one commit."""

    digest = None

    def __init__(self, hub: HubModel):
        import huggingface_hub as hf

        self.sha256: dict[str, str] = {}
        try:
            info = hf.HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
        except (hf.errors.HfHubHTTPError, OSError) as error:
            hint = "Correct repo and revision; for a gated or private repository set HF_TOKEN in pod.env."
            raise Fault(
                Reason.OBJECT_MISSING, f"hub {hub.repo}@{hub.revision}: {type(error).__name__}", hint
            ) from error
        self.uri = f"hf://{hub.repo}@{info.sha}"
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        self.sha256 = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
        self._root = f"{hub.repo}@{info.sha}"
        self._files = hf.HfFileSystem()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See Folder."""
        content = self._files.cat_file(f"{self._root}/{name}", start=start, end=start + len(buffer))
        if len(content) != len(buffer):
            raise Fault(Reason.STORAGE_UNREACHABLE, f"{self.uri}/{name}: got {len(content)} of {len(buffer)} bytes")
        buffer[:] = content
