"""What rows show, brought into this pod and opened once, to see that it is what it should be."""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import S3Place
from trimtab_trainer.data import film, sound
from trimtab_trainer.data.collecting import rows_of
from trimtab_trainer.data.media import Root
from trimtab_trainer.data.rows import Kind, shown
from trimtab_trainer.endings import Fault

LARGEST = 178_956_970
"""Most pixels of an image: Pillow's own bound against images that unpack to more memory than there is."""


class Picture(NamedTuple):
    """What is known of an image that was not decoded, in pixels."""

    height: int
    width: int


About = Picture | film.Film | sound.Sound


class Named(NamedTuple):
    """What a row shows."""

    kind: Kind
    name: str
    """Its whole name."""
    place: str
    """How a person finds the row."""


@dataclass(frozen=True)
class Medium:
    """An image, a video or a sound that lies in this pod."""

    kind: Kind
    path: Path
    about: About


@dataclass(frozen=True)
class Media:
    """All that the rows of a run show."""

    shown: list[Medium]
    index: dict[tuple[Kind, str], int]
    """From kind and whole name to the place in `shown`."""
    digest: str
    """Over the contents, whatever their names."""

    def size(self, name: str) -> tuple[int, int]:
        """Height and width in pixels of an image, by its whole name."""
        about = self.shown[self.index["image", name]].about
        assert isinstance(about, Picture)
        return about

    @property
    def kinds(self) -> set[Kind]:
        """The kinds that there are."""
        return {kind for kind, _ in self.index}


def named(rows: Path, what: str) -> Iterator[Named]:
    """What the rows of a collected file show; `what` says of which rows, for messages."""
    for number, row in enumerate(rows_of(rows), start=1):
        for kind, name in shown(row):
            yield Named(kind, name, f"{what} row {number}")


def gather(wanted: Iterable[Named], roots: Iterable[Root], into: Path) -> Media:
    """Bring what rows show into this pod.

    Raises Fault(ObjectMissing) for what is not there, Fault(DataInvalid) for what is not what it should be.
    """
    first: dict[tuple[Kind, str], str] = {}
    for each in wanted:
        first.setdefault((each.kind, each.name), each.place)
    into.mkdir(parents=True, exist_ok=True)
    places = _fetched([name for _, name in first], [root.s3 for root in roots if root.s3 is not None], into)
    found, digest = [], hashlib.sha256()
    for (kind, name), place in first.items():
        said = f"{place}: {kind} {name[: 40 if name.startswith('data:') else 200]}"
        path = places.get(name) or (_unpacked(name, into, said) if name.startswith("data:") else Path(name))
        if not path.is_file():
            raise Fault(Reason.OBJECT_MISSING, f"{said} is not there", "Upload it, or correct the row.")
        found.append(Medium(kind, path, _opened(kind, path, said)))
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    index = {key: number for number, key in enumerate(first)}
    return Media(found, index, "sha256:" + digest.hexdigest())


def _fetched(wanted: list[str], places: list[S3Place], into: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for number, place in enumerate({place.uri: place for place in places}.values()):
        prefix = place.uri.rstrip("/") + "/"
        mine = [name for name in wanted if name.startswith(prefix) and name not in found]
        if not mine:
            continue
        folder = into / f"from-{number}"
        patterns = [glob.escape(name.removeprefix(prefix)) for name in mine]
        with store.connect(place.connection) as s3:
            store.fetch(s3, place.uri, folder, only=patterns, foreign=True)
        found |= {name: folder / name.removeprefix(prefix) for name in mine}
    return found


def _unpacked(name: str, into: Path, said: str) -> Path:
    path = into / hashlib.sha256(name.encode()).hexdigest()
    try:
        path.write_bytes(base64.b64decode(name.split(",", 1)[-1], validate=True))
    except binascii.Error as error:
        raise Fault(Reason.DATA_INVALID, f"{said}… is not base64: {error}", "Correct the data: URI.") from error
    return path


def _opened(kind: Kind, path: Path, said: str) -> About:
    if kind == "image":
        return _picture(path, said)
    try:
        return film.look(path) if kind == "video" else sound.look(path)
    except film.Unreadable as error:
        raise Fault(Reason.DATA_INVALID, f"{said} {error}", "Replace it, or take the row out.") from error


def _picture(path: Path, said: str) -> Picture:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise Fault(Reason.DATA_INVALID, f"{said} has {width}x{height} pixels", "Make it smaller.")
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise Fault(Reason.DATA_INVALID, f"{said} does not open: {error}", "Replace it.") from error
    return Picture(height, width)
