"""Brings a base or an adapter to the local disk, verified, and says what it is.

Object storage goes through the content-addressed cache of trimtab_store; a volume is used where it is mounted; the hub
is asked through huggingface_hub. Whatever goes wrong leaves here as Unservable.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trimtab_api.conditions import Reason
from trimtab_api.contract import MANIFEST_NAME, Connection, Manifest, ModelInput, S3Place
from trimtab_api.v1alpha1.source import HubModel
from trimtab_server.agent.failure import Unservable
from trimtab_store import S3, Cache, connect
from trimtab_store.errors import StorageError

PATIENCE_SECONDS = 10.0
"""How long one try bears a storage that does not answer: the reason must be known within half a minute."""
ANSWERABLE = frozenset(
    {
        Reason.BUCKET_MISSING,
        Reason.OBJECT_MISSING,
        Reason.CREDENTIALS_MISSING,
        Reason.CREDENTIALS_WRONG,
        Reason.STORAGE_UNREACHABLE,
        Reason.DISK_FULL,
        Reason.NOT_AN_ARTIFACT,
        Reason.DIGEST_MISMATCH,
        Reason.INPUT_CHANGED,
        Reason.UNSAFE_FORMAT,
        Reason.SPEC_INVALID,
    }
)
"""Reasons of storage that a user can do something about; every other one is ModelInvalid."""

Kind = Literal["model", "adapter"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fetched:
    """An input on the local disk."""

    path: Path
    digest: str | None
    """Identity; None for a model on a volume without a manifest."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of its making; empty without one."""
    release: Callable[[], None] = lambda: None
    """Lets the cache evict it."""


class Inputs:
    """Fetches inputs through one cache; blocking work runs in threads."""

    def __init__(self, cache: Cache, hub_folder: Path) -> None:
        self._cache = cache
        self._hub_folder = hub_folder
        self._connections: dict[str, S3] = {}
        self._connecting = threading.Lock()

    async def fetch(self, source: ModelInput, kind: Kind, progress: Progress | None = None) -> Fetched:
        """The input, complete and verified, kept in the cache until released. Raises Unservable.

        `progress` is called from worker threads with the bytes that are here and those that there are.
        """
        try:
            return await _finish(asyncio.to_thread(self._fetch, source, kind, progress))
        except StorageError as error:
            reason = error.reason if error.reason in ANSWERABLE else Reason.MODEL_INVALID
            raise Unservable(reason, f"{source.field}: {error}", transient=error.transient) from error

    def _fetch(self, source: ModelInput, kind: Kind, progress: Progress | None) -> Fetched:
        if source.s3 is not None:
            return self._from_storage(source.s3, progress)
        if source.hugging_face is not None:
            return _from_hub(source.field, source.hugging_face, self._hub_folder)
        if source.path is not None:
            return _from_folder(source.field, Path(source.path), kind)
        raise Unservable(Reason.SPEC_INVALID, f"{source.field}: names no source; give s3, huggingFace or volume")

    def _from_storage(self, place: S3Place, progress: Progress | None) -> Fetched:
        # A folder that was not published by us is taken as it is listed, so it may be a half-finished upload:
        # the checks of what it holds find that, and it is looked at again.
        entry = self._cache.get(
            self._connected(place.connection),
            place.uri,
            expected_digest=place.digest,
            safetensors_only=True,
            foreign=True,
            progress=progress,
        )
        return Fetched(entry.path, entry.digest, _made_by(entry.path), entry.release)

    def _connected(self, connection: Connection) -> S3:
        """One client for each storage: a client costs some ten megabytes, and reads rotated keys by itself."""
        with self._connecting:
            key = connection.model_dump_json()
            if key not in self._connections:
                self._connections[key] = connect(connection, patience=PATIENCE_SECONDS)
            return self._connections[key]


async def _finish(work: Coroutine[Any, Any, Fetched]) -> Fetched:
    """Await work in a thread. A thread cannot be cancelled: what it fetches for nobody is let go when it ends."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_let_go)
        raise


def _let_go(task: asyncio.Task[Fetched]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().release()


def _from_folder(named_by: str, folder: Path, kind: Kind) -> Fetched:
    if not folder.is_dir():
        raise Unservable(Reason.OBJECT_MISSING, f"{named_by}: {folder} is no folder on the volume; correct the path")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [each.name for each in folder.iterdir() if each.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickled:
            raise Unservable(
                Reason.UNSAFE_FORMAT,
                f"{named_by}: {folder} holds its weights as pickle ({pickled[0]}), which runs code when it is opened; "
                "save them as safetensors",
            )
        raise Unservable(
            Reason.MODEL_INVALID, f"{named_by}: {folder} holds no *.safetensors; point to the folder of the weights"
        )
    manifest = folder / MANIFEST_NAME
    if manifest.is_file():
        return Fetched(folder, "sha256:" + hashlib.sha256(manifest.read_bytes()).hexdigest(), _made_by(folder))
    return Fetched(folder, _content_digest(folder) if kind == "adapter" else None)


def _content_digest(folder: Path) -> str:
    """Identity of a small folder that has no manifest: sha256 over names and contents."""
    whole = hashlib.sha256()
    for file in sorted(each for each in folder.iterdir() if each.is_file()):
        with file.open("rb") as content:
            whole.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return "sha256:" + whole.hexdigest()


def _from_hub(named_by: str, model: HubModel, folder: Path) -> Fetched:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(
            huggingface_hub.snapshot_download(
                model.repo,
                revision=model.revision,
                cache_dir=folder,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"],
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise Unservable(
            Reason.OBJECT_MISSING,
            f"{named_by}: {model.repo} at {model.revision} cannot be had from the Hugging Face hub: {error}; "
            "check repo, revision and the pod's way to the hub",
            transient=True,
        ) from error
    # The folder is named after the commit, which is the identity that the hub gives.
    return Fetched(path, "sha256:" + hashlib.sha256(path.name.encode()).hexdigest())


def _made_by(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_NAME
    try:
        return Manifest.read(json.loads(file.read_bytes())).made_by
    except FileNotFoundError:
        return {}
    except (ValidationError, json.JSONDecodeError) as error:
        raise Unservable(
            Reason.NOT_AN_ARTIFACT, f"{file.name} of {folder.name} does not parse: {error}; publish the artifact again"
        ) from error
