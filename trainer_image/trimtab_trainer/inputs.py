"""Models and data that a run reads, made into local paths; each held against the pin of the first attempt."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import MANIFEST_NAME, CodeInput, DataInput, Manifest, ModelInput, RunConfig, S3Place
from trimtab_api.v1alpha1.source import HubData, HubModel
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_trainer.endings import Fault

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
)
SMALL_MODEL_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "adapter_config.json",
    "args.json",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
MODEL_FILES = (*WEIGHT_FILES, *SMALL_MODEL_FILES)
ADAPTER_CONFIG = "adapter_config.json"
"""The file that tells an adapter from a whole model."""


@dataclass(frozen=True)
class LocalModel:
    """A model or tokenizer that lies in this pod."""

    path: Path
    reference: str
    """Logical reference, never a path of this pod."""
    digest: str | None
    """Identity of its source, when it has one."""
    base: LocalModel | None = None
    """What an adapter was trained on, when it was fetched with it; see merge.lineage.fetch_with_base."""


@dataclass(frozen=True)
class LocalData:
    """The files of one source of rows."""

    source: DataInput
    files: list[Path]
    display: str
    """How messages name it: the s3 uri, the path, or inline."""
    digest: str | None
    """Identity of its source, when it has one."""
    whole: bool = True
    """False when only a beginning was fetched, to look at."""


@dataclass(frozen=True)
class LocalCode:
    """A file of the user's Python."""

    source: CodeInput
    content: bytes
    digest: str


def uses_hub(config: RunConfig) -> bool:
    """Whether a source is on the Hugging Face hub, so that the network must be asked."""
    models = [model.hugging_face for model in (config.model, config.tokenizer, *config.further) if model]
    data = [source.hugging_face for source in (*config.train, *config.validation)]
    return any(place is not None for place in (*models, *data))


class Pins:
    """The inputs as the first attempt found them."""

    def __init__(self, pins: Iterable[PinnedInput]):
        self._digests = {pin.field: pin.digest for pin in pins}

    def hold(self, field: str, uri: str, digest: str | None) -> None:
        """Raise Fault(InputChanged) when an input is not what it was."""
        wanted = self._digests.get(field)
        if wanted is not None and digest is not None and wanted != digest:
            raise Fault(
                Reason.INPUT_CHANGED, f"{field} {uri} is {digest[:19]}… now, and was {wanted[:19]}… at the start"
            )


def fetch_model(
    source: ModelInput, into: Path, pins: Pins, only: tuple[str, ...] = MODEL_FILES, patience: float = 120.0
) -> LocalModel:
    """Bring a model (or the files of it that match `only`) into this pod.

    Raises the store's errors, and Fault when the source changed or holds no safetensors.
    """
    if source.s3 is not None:
        path, digest = into, _fetch_s3(source.s3, into, only, patience)
        reference = source.s3.uri
    elif source.hugging_face is not None:
        path, reference = _fetch_hub_model(source.hugging_face, into, only)
        digest = None
    else:
        path, reference = Path(source.path or ""), source.reference
        digest = _folder_digest(source.field, path)
    pins.hold(source.field, reference, digest)
    if only is MODEL_FILES and not any(path.glob("*.safetensors")):
        hint = "Save the weights as safetensors; pickled ones are never opened, because that can run code."
        raise Fault(Reason.UNSAFE_FORMAT, f"{source.field} {reference}: no *.safetensors there", hint)
    return LocalModel(path=path, reference=reference, digest=digest)


def read_code(source: CodeInput, pins: Pins) -> LocalCode:
    """The file of Python as it is now.

    Raises Fault when it is not there, or not what it was at the start.
    """
    try:
        content = Path(source.path).read_bytes()
    except OSError as error:
        hint = "Correct name and key, or make the file."
        raise Fault(Reason.OBJECT_MISSING, f"{source.field} {source.reference}: {error.strerror}", hint) from error
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    pins.hold(source.field, source.reference, digest)
    return LocalCode(source, content, digest)


def fetch_data(source: DataInput, into: Path, pins: Pins, patience: float = 120.0) -> LocalData:
    """Bring the files of one source of rows into this pod.

    Raises the store's errors, and Fault when the source changed or holds no file of a known kind.
    """
    digest: str | None
    if source.inline is not None:
        into.mkdir(parents=True, exist_ok=True)
        path = into / "inline.jsonl"
        path.write_text(source.inline)
        return LocalData(source, [path], "inline", "sha256:" + hashlib.sha256(source.inline.encode()).hexdigest())
    if source.s3 is not None:
        display = source.s3.uri
        files, digest = _fetch_s3_data(source.s3, into, patience)
    elif source.hugging_face is not None:
        files, display = _fetch_hub_data(source.hugging_face, into)
        digest = None
    else:
        root = Path(source.path or "")
        volume = source.part.from_.volume
        display = str(root) if volume is None else f"volume://{volume.claim_name}/{volume.path}".rstrip("/")
        files = data_files(root)
        digest = _digest_files(root, files)
    if not files:
        raise no_file(source, display)
    pins.hold(source.field, display, digest)
    return LocalData(source, files, display, digest)


def fetch_beginning(source: DataInput, into: Path, pins: Pins, limit: int, lines: int, patience: float) -> LocalData:
    """The same for a look: of object storage with more than `limit` bytes, only the first lines of each text file.

    Raises what fetch_data raises.
    """
    if source.s3 is None:
        return fetch_data(source, into, pins, patience)
    with store.connect(source.s3.connection, patience=patience) as s3:
        identity = store.identify(s3, source.s3.uri)
        wanted = [name for name in identity.files if name.endswith((".jsonl", ".ndjson", ".txt"))]
        if identity.size <= limit or not wanted:
            return fetch_data(source, into, pins, patience)
        pins.hold(source.field, source.s3.uri, identity.digest)
        for name in wanted:
            uri = source.s3.uri if identity.single else f"{source.s3.uri.rstrip('/')}/{name}"
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as stream:
                stream.writelines(f"{line}\n" for line in itertools.islice(s3.open_lines(uri), lines))
    return LocalData(source, [into / name for name in wanted], source.s3.uri, identity.digest, whole=False)


def no_file(source: DataInput, display: str) -> Fault:
    """The fault of a source without any file of rows."""
    known = " ".join(DATA_SUFFIXES)
    return Fault(
        Reason.OBJECT_MISSING, f"{source.field} {display}: no file of a known kind", f"Put files of {known} there."
    )


def _fetch_s3(place: S3Place, into: Path, only: tuple[str, ...], patience: float) -> str:
    with store.connect(place.connection, patience=patience) as s3:
        return store.fetch(s3, place.uri, into, expected_digest=place.digest, only=only, foreign=True)


def _fetch_s3_data(place: S3Place, into: Path, patience: float) -> tuple[list[Path], str]:
    wanted = [f"*{suffix}" for suffix in DATA_SUFFIXES]
    with store.connect(place.connection, patience=patience) as s3:
        digest = store.fetch(s3, place.uri, into, expected_digest=place.digest, only=wanted, foreign=True)
    return data_files(into), digest


def _fetch_hub_model(hub: HubModel, into: Path, only: tuple[str, ...]) -> tuple[Path, str]:
    import huggingface_hub as hf

    try:
        commit = hf.HfApi().model_info(hub.repo, revision=hub.revision).sha
        path = hf.snapshot_download(hub.repo, revision=commit, local_dir=into, allow_patterns=list(only))
    except (hf.errors.HfHubHTTPError, hf.errors.LocalEntryNotFoundError, OSError) as error:
        raise hub_fault(hub.repo, hub.revision, error) from error
    return Path(path), f"hf://{hub.repo}@{commit}"


def _fetch_hub_data(hub: HubData, into: Path) -> tuple[list[Path], str]:
    import datasets
    import huggingface_hub as hf

    try:
        commit = hf.HfApi().dataset_info(hub.repo, revision=hub.revision).sha
        rows = datasets.load_dataset(hub.repo, hub.subset, split=hub.split, revision=commit, streaming=True)
        into.mkdir(parents=True, exist_ok=True)
        path = into / "hub.jsonl"
        with path.open("w") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    except (hf.errors.HfHubHTTPError, hf.errors.LocalEntryNotFoundError, OSError) as error:
        raise hub_fault(hub.repo, hub.revision, error) from error
    return [path], f"hf://datasets/{hub.repo}@{commit}"


def hub_fault(repo: str, revision: str, error: Exception) -> Fault:
    """What it means when the hub does not give a repository."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        hint = "Correct repo and revision; for a gated or private repository set HF_TOKEN in pod.env."
        return Fault(Reason.OBJECT_MISSING, f"hub {repo}@{revision}: not there or not allowed ({status})", hint)
    return Fault(
        Reason.STORAGE_UNREACHABLE, f"hub {repo}@{revision}: {type(error).__name__}", "Check the pod's network."
    )


def data_files(root: Path) -> list[Path]:
    """The files of rows in a folder, in order; the file itself when it is one."""
    if root.is_file():
        return [root] if root.suffix in DATA_SUFFIXES else []
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in DATA_SUFFIXES)


def _digest_files(root: Path, files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        whole.update(f"{name} {content}\n".encode())
    return "sha256:" + whole.hexdigest()


def _folder_digest(field: str, path: Path) -> str | None:
    if not path.is_dir():
        raise Fault(Reason.OBJECT_MISSING, f"{field} {path}: no such folder", "Correct the path.")
    manifest = path / MANIFEST_NAME
    return Manifest.model_validate_json(manifest.read_bytes()).digest if manifest.is_file() else None
