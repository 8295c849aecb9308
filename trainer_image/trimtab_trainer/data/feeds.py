"""Sources of rows that are read row by row, again and again, with nothing of them kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput, S3Place
from trimtab_api.v1alpha1.source import HubData
from trimtab_trainer.data.reading import read
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import DATA_SUFFIXES, Pins, data_files, hub_fault, no_file

FedRow = tuple[str, int, str | dict[str, Any]]
"""Where a row stands, its number, and its text or its columns."""
STREAMED_SUFFIXES = (".jsonl", ".ndjson", ".txt")
"""Files of object storage that are read line by line."""


class Feed:
    """The rows of one source, read from its beginning each time, with nothing of them kept."""

    def __init__(self, source: DataInput, display: str, digest: str | None, rows: Callable[[], Iterator[FedRow]]):
        self.source = source
        self.display = display
        """How messages name it."""
        self.digest = digest
        """What identifies it without reading it whole: its manifest or listing, its commit, its text."""
        self.read = rows
        """All rows from the first on. Raises the store's errors, and Fault(InputChanged)."""


def open_feed(source: DataInput, pins: Pins, patience: float = 120.0) -> Feed:
    """Open a source of rows for reading row by row.

    Raises the store's errors, and Fault when the source changed or cannot be read so.
    """
    if source.inline is not None:
        text = source.inline
        digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        return Feed(source, "inline", digest, lambda: _numbered(f"{source.field} inline", text.splitlines(), ".jsonl"))
    if source.s3 is not None:
        return _s3_feed(source, source.s3, pins, patience)
    if source.hugging_face is not None:
        return _hub_feed(source, source.hugging_face)
    root = Path(source.path or "")
    files = data_files(root)
    if not files:
        raise no_file(source, str(root))
    sizes = [(path.relative_to(root).as_posix() if root.is_dir() else path.name, path.stat()) for path in files]
    listing = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in sizes)
    digest = "sha256:" + hashlib.sha256(listing.encode()).hexdigest()

    def rows() -> Iterator[FedRow]:
        for path in files:
            where = f"{source.field} {path if root.is_file() else path.relative_to(root)}"
            if path.suffix in STREAMED_SUFFIXES:
                with path.open(encoding="utf-8", errors="surrogateescape") as stream:
                    yield from _numbered(where, stream, path.suffix)
            else:
                yield from ((where, number, row) for number, row in read(path, where))

    return Feed(source, str(root), digest, rows)


def _s3_feed(source: DataInput, place: S3Place, pins: Pins, patience: float) -> Feed:
    with store.connect(place.connection, patience=patience) as s3:
        identity = store.identify(s3, place.uri)
    pins.hold(source.field, place.uri, identity.digest)
    names = [name for name in identity.files if name.endswith(DATA_SUFFIXES)]
    if not names:
        raise no_file(source, place.uri)
    if whole := [name for name in names if not name.endswith(STREAMED_SUFFIXES)]:
        raise Fault(
            Reason.SPEC_INVALID,
            f"{source.field} {place.uri}: {whole[0]} cannot be read line by line",
            "Write the rows as .jsonl, or remove dataset.streaming.",
        )

    def rows() -> Iterator[FedRow]:
        with store.connect(place.connection, patience=patience) as s3:
            now = store.identify(s3, place.uri).digest
            if now != identity.digest:
                raise Fault(Reason.INPUT_CHANGED, f"{source.field} {place.uri} was replaced while it was read")
            for name in names:
                uri = place.uri if identity.single else f"{place.uri.rstrip('/')}/{name}"
                yield from _numbered(f"{source.field} {uri}", s3.open_lines(uri), Path(name).suffix)

    return Feed(source, place.uri, identity.digest, rows)


def _hub_feed(source: DataInput, hub: HubData) -> Feed:
    import datasets
    import huggingface_hub as hf

    try:
        commit = hf.HfApi().dataset_info(hub.repo, revision=hub.revision).sha
    except (hf.errors.HfHubHTTPError, OSError) as error:
        raise hub_fault(hub.repo, hub.revision, error) from error
    display = f"hf://datasets/{hub.repo}@{commit}"

    def rows() -> Iterator[FedRow]:
        try:
            found = datasets.load_dataset(hub.repo, hub.subset, split=hub.split, revision=commit, streaming=True)
            for number, row in enumerate(found, start=1):
                yield f"{source.field} {display}", number, {k: v for k, v in row.items() if v is not None}
        except (hf.errors.HfHubHTTPError, OSError) as error:
            raise hub_fault(hub.repo, hub.revision, error) from error

    return Feed(source, display, "sha256:" + hashlib.sha256(display.encode()).hexdigest(), rows)


def _numbered(where: str, lines: Iterable[str], suffix: str) -> Iterator[FedRow]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield where, number, {"text": line.rstrip("\r\n")} if suffix == ".txt" else line
