"""Images that rows name: told apart from text, brought into this pod, opened once to see that they are images.

A conversation shows an image where it writes <image>; the row's column images says which, in the same order. A name is
a path below the folder of the data file (or below the part's mediaFrom), or a data: URI. Nothing comes from the web.
"""

from __future__ import annotations

import base64
import binascii
import glob
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import trimtab_store as store
from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, S3Place
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data.boxes import boxed, see_none
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import IMAGE_TAG, IMAGES, Row
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalData

_COLUMNS = ("images", "image")
_UNSEEN = ("videos", "audios")
_SPOKEN = ("prompt", "messages", "chosen", "completion")
"""Columns of messages, in the order in which they are said."""
_AGAIN = ("rejected", "rejected_messages")
"""Columns that may say the prompt again."""
LARGEST = 178_956_970
"""Most pixels of an image: Pillow's own bound against images that unpack to more memory than there is."""


@dataclass(frozen=True)
class Root:
    """Where relative names begin: a prefix in object storage or a folder in this pod."""

    s3: S3Place | None = None
    path: Path | None = None

    @classmethod
    def of(cls, local: LocalData, given: ModelInput | None) -> Root:
        """The folder that the spec names, else the one that the data file lies in."""
        if given is not None:
            return cls(s3=given.s3, path=None if given.path is None else Path(given.path))
        place = local.source.s3
        if place is not None:
            single = place.uri.rstrip("/").rsplit("/", 1)[-1] == local.files[0].name
            return cls(s3=place.model_copy(update={"uri": place.uri.rsplit("/", 1)[0] if single else place.uri}))
        if local.source.path is not None:
            path = Path(local.source.path)
            return cls(path=path if path.is_dir() else path.parent)
        return cls()

    def name(self, written: str, where: str, row: int) -> str:
        """The whole name of an image: a data: URI, an s3:// URI or a path in this pod."""
        if written.startswith("data:"):
            return written
        if "://" in written:
            raise broken(where, row, f"image {written[:80]!r} is a URL", "Copy it beside the rows and name its path.")
        parts = PurePosixPath(written).parts
        if not parts or parts[0] == "/" or ".." in parts:
            hint = "Name it by its path below the data file's folder, or below mediaFrom."
            raise broken(where, row, f"image {written[:80]!r} is no path below a folder", hint)
        if self.s3 is not None:
            return f"{self.s3.uri.rstrip('/')}/{written}"
        if self.path is not None:
            return str(self.path / written)
        hint = "Set mediaFrom beside from, or write the image as a data: URI."
        raise broken(where, row, f"image {written[:80]!r} has no folder: the rows are inline", hint)


def tagged(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw row whose messages are lists of parts, with image parts as tags and their names in the column images.

    A part without a name is one that the column images names already.
    """
    names: list[str] = []
    flat = {column: _flat(raw[column], names) for column in _SPOKEN if isinstance(raw.get(column), list)}
    for column in _AGAIN:
        if isinstance(raw.get(column), list):
            again: list[str] = []
            messages = _flat(raw[column], again)
            # Other images than the better answer's stay as they are written, and are refused as such.
            flat |= {column: messages} if again in ([], names) else {}
    return {**raw, **flat, **({IMAGES: names} if names else {})}


def _flat(messages: list[Any], names: list[str]) -> list[Any]:
    return [_without_parts(message, names) for message in messages]


def _without_parts(message: Any, names: list[str]) -> Any:
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not any(_shows(part) for part in parts):
        return message
    text = ""
    for part in parts:
        if _shows(part):
            text += IMAGE_TAG
            names += [name for name in [_name(part)] if name is not None]
        elif isinstance(part, dict):
            text += str(part.get("text", ""))
    return {**message, "content": text}


def _shows(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _name(part: dict[str, Any]) -> str | None:
    """The name in an image part: {"type": "image", "image": ...} or OpenAI's {"type": "image_url", ...}."""
    found = part.get("image", part.get("url", part.get("image_url")))
    found = found.get("url") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def seen(raw: Mapping[str, Any], row: Row, root: Root | None, looks: bool, boxes: bool, where: str, number: int) -> Row:
    """The standard row as a method takes it that looks at images and at boxes on them, or does not.

    Raises Fault(DataInvalid) for what it brings and nobody looks at, and what `attached` and `boxed` raise.
    """
    _see_none(raw, _UNSEEN if looks else (*_COLUMNS, *_UNSEEN), where, number)
    row = attached(raw, row, root, where, number) if looks else row
    if boxes:
        return boxed(raw, row, where, number)
    see_none(raw, row, where, number)
    return row


def attached(raw: Mapping[str, Any], row: Row, root: Root | None, where: str, number: int) -> Row:
    """The standard row with the whole names of its images.

    Raises Fault(DataInvalid) when tags and names are not equally many, or the rows are streamed and have no root.
    """
    written: Any = next((raw[name] for name in _COLUMNS if raw.get(name)), [])
    names = [written] if isinstance(written, str) else written
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise broken(where, number, "'images' must be a list of paths or data: URIs")
    if not names:
        return row
    if root is None:
        raise broken(where, number, "it shows images, and the rows are streamed", "Leave dataset.streaming out.")
    tags = sum(str(message.get("content", "")).count(IMAGE_TAG) for message in row.get("messages", []))
    if tags != len(names):
        hint = f"Write {IMAGE_TAG} into a message for each image, in their order."
        raise broken(where, number, f"'images' names {len(names)}, the messages show {tags} {IMAGE_TAG}", hint)
    return {**row, IMAGES: [root.name(name, where, number) for name in names]}


def _see_none(raw: Mapping[str, Any], columns: Iterable[str], where: str, number: int) -> None:
    """Raise Fault(DataInvalid) when a row brings what is not looked at."""
    for column in columns:
        if raw.get(column):
            raise broken(where, number, f"'{column}' is given, and this job does not look at it", "Leave it out.")


def see_prompt_alone(row: Row, answers: Iterable[Mapping[str, Any]], where: str, number: int) -> None:
    """Raise Fault(DataInvalid) when an answer shows an image, where images belong to the prompt."""
    if row.get(IMAGES) and any(IMAGE_TAG in str(answer.get("content", "")) for answer in answers):
        raise broken(where, number, f"an answer shows an {IMAGE_TAG}", "Show images in the prompt.")


def see_unpacked(dataset: Dataset) -> None:
    """Raise Fault(SpecInvalid) when rows that show images are to share a sequence: each must keep its images."""
    if dataset.packing is not None or dataset.padding_free:
        field = "dataset.packing" if dataset.packing is not None else "dataset.paddingFree"
        raise Fault(Reason.SPEC_INVALID, f"{field}: the rows show images, which are not packed", "Leave it out.")


@dataclass(frozen=True)
class Media:
    """All images of a run, as files in this pod."""

    paths: list[Path]
    index: dict[str, int]
    """From the whole name to the place in `paths`."""
    sizes: list[tuple[int, int]]
    """Height and width in pixels."""
    digest: str
    """Over the contents, whatever their names."""

    def size(self, name: str) -> tuple[int, int]:
        """Height and width in pixels of an image, by its whole name."""
        return self.sizes[self.index[name]]


def gather(names: Iterable[str], roots: Iterable[Root], into: Path) -> Media:
    """Bring images into this pod.

    Raises Fault(ObjectMissing) for one that is not there, Fault(DataInvalid) for one that is no image.
    """
    wanted = list(dict.fromkeys(names))
    into.mkdir(parents=True, exist_ok=True)
    places = _fetched(wanted, [root.s3 for root in roots if root.s3 is not None], into)
    paths, sizes, digest = [], [], hashlib.sha256()
    for name in wanted:
        path = places.get(name) or (_unpacked(name, into) if name.startswith("data:") else Path(name))
        if not path.is_file():
            raise Fault(Reason.OBJECT_MISSING, f"image {name[:200]} is not there", "Upload it, or correct the row.")
        sizes.append(_opened(path, name))
        paths.append(path)
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    index = {name: number for number, name in enumerate(wanted)}
    return Media(paths, index, sizes, "sha256:" + digest.hexdigest())


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


def _unpacked(name: str, into: Path) -> Path:
    path = into / hashlib.sha256(name.encode()).hexdigest()
    try:
        path.write_bytes(base64.b64decode(name.split(",", 1)[-1], validate=True))
    except binascii.Error as error:
        raise Fault(
            Reason.DATA_INVALID, f"image {name[:40]}… is not base64: {error}", "Correct the data: URI."
        ) from error
    return path


def _opened(path: Path, name: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise Fault(Reason.DATA_INVALID, f"image {name[:200]} has {width}x{height} pixels", "Make it smaller.")
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise Fault(Reason.DATA_INVALID, f"image {name[:200]} does not open: {error}", "Replace it.") from error
    return height, width
