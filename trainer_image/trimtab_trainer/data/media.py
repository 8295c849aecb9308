"""Images, videos and sound that rows name, told apart from text.

A conversation shows an image where it writes <image>; the row's column images says which, in the same order. So it is
with <video> and videos, <audio> and audios. A name is a path below the folder of the data file (or below the part's
mediaFrom), or a data: URI. Nothing comes from the web.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, S3Place
from trimtab_api.v1alpha1.dataset import Dataset
from trimtab_trainer.data.boxes import boxed, see_none
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import COLUMNS, KINDS, TAGS, Kind, Row
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalData

_WRITTEN: dict[Kind, tuple[str, str]] = {kind: (column, kind) for kind, column in COLUMNS.items()}
"""Columns of a raw row that name what it shows."""
_PARTS: dict[str, Kind] = {
    **{kind: kind for kind in KINDS},
    **{f"{kind}_url": kind for kind in KINDS},
    "input_audio": "audio",
}
"""Types of the parts of a message that show something."""
Names = dict[Kind, list[str]]
_SPOKEN = ("prompt", "messages", "chosen", "completion")
"""Columns of messages, in the order in which they are said."""
_AGAIN = ("rejected", "rejected_messages")
"""Columns that may say the prompt again."""


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

    @property
    def place(self) -> str | None:
        """What whole names begin with; None where only data: URIs have names."""
        return self.s3.uri.rstrip("/") if self.s3 is not None else None if self.path is None else str(self.path)

    def name(self, kind: Kind, written: str, where: str, row: int) -> str:
        """The whole name of what is shown: a data: URI, an s3:// URI or a path in this pod."""
        if written.startswith("data:"):
            return written
        if "://" in written:
            raise broken(where, row, f"{kind} {written[:80]!r} is a URL", "Copy it beside the rows and name its path.")
        parts = PurePosixPath(written).parts
        if not parts or parts[0] == "/" or ".." in parts:
            hint = "Name it by its path below the data file's folder, or below mediaFrom."
            raise broken(where, row, f"{kind} {written[:80]!r} is no path below a folder", hint)
        if self.s3 is not None:
            return f"{self.s3.uri.rstrip('/')}/{written}"
        if self.path is not None:
            return str(self.path / written)
        hint = f"Set mediaFrom beside from, or write the {kind} as a data: URI."
        raise broken(where, row, f"{kind} {written[:80]!r} has no folder: the rows are inline", hint)


def tagged(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw row whose messages are lists of parts, with what parts show as tags and the names in the row's columns.

    A part without a name is one that the column names already.
    """
    names: Names = {}
    flat = {column: _flat(raw[column], names) for column in _SPOKEN if isinstance(raw.get(column), list)}
    for column in _AGAIN:
        if isinstance(raw.get(column), list):
            again: Names = {}
            messages = _flat(raw[column], again)
            # Others than the better answer's stay as they are written, and are refused as such.
            flat |= {column: messages} if again in ({}, names) else {}
    return {**raw, **flat, **{COLUMNS[kind]: found for kind, found in names.items()}}


def _flat(messages: list[Any], names: Names) -> list[Any]:
    return [_without_parts(message, names) for message in messages]


def _without_parts(message: Any, names: Names) -> Any:
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list) or not any(_kind(part) for part in parts):
        return message
    text = ""
    for part in parts:
        kind = _kind(part)
        if kind is not None:
            text += TAGS[kind]
            name = _name(part, kind)
            if name is not None:
                names.setdefault(kind, []).append(name)
        elif isinstance(part, dict):
            text += str(part.get("text", ""))
    return {**message, "content": text}


def _kind(part: Any) -> Kind | None:
    return _PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None


def _name(part: dict[str, Any], kind: Kind) -> str | None:
    """The name in a part: {"type": "image", "image": ...}, or OpenAI's image_url and input_audio, and their like."""
    found = next((part[key] for key in (kind, "url", f"{kind}_url", f"input_{kind}") if key in part), None)
    if isinstance(found, dict) and isinstance(found.get("data"), str):
        return f"data:{kind}/{found.get('format', '')};base64,{found['data']}"
    found = found.get("url") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def seen(
    raw: Mapping[str, Any], row: Row, root: Root | None, looks: Iterable[Kind], boxes: bool, where: str, number: int
) -> Row:
    """The standard row as a method takes it that looks at these kinds, and at boxes on images or does not.

    Raises Fault(DataInvalid) for what it brings and nobody looks at, and what `attached` and `boxed` raise.
    """
    for kind in KINDS:
        if kind in looks:
            row = attached(kind, raw, row, root, where, number)
        else:
            _see_none(raw, _WRITTEN[kind], where, number)
    if boxes:
        return boxed(raw, row, where, number)
    see_none(raw, row, where, number)
    return row


def attached(kind: Kind, raw: Mapping[str, Any], row: Row, root: Root | None, where: str, number: int) -> Row:
    """The standard row with the whole names of what it shows of a kind.

    Raises Fault(DataInvalid) when tags and names are not equally many, or the rows are streamed and have no root.
    """
    column, tag = COLUMNS[kind], TAGS[kind]
    written: Any = next((raw[name] for name in _WRITTEN[kind] if raw.get(name)), [])
    names = [written] if isinstance(written, str) else written
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise broken(where, number, f"'{column}' must be a list of paths or data: URIs")
    if not names:
        return row
    if root is None:
        raise broken(where, number, f"it shows {column}, and the rows are streamed", "Leave dataset.streaming out.")
    tags = sum(str(message.get("content", "")).count(tag) for message in row.get("messages", []))
    if tags != len(names):
        hint = f"Write {tag} into a message for each of them, in their order."
        raise broken(where, number, f"'{column}' names {len(names)}, the messages show {tags} {tag}", hint)
    return {**row, column: [root.name(kind, name, where, number) for name in names]}


def _see_none(raw: Mapping[str, Any], columns: Iterable[str], where: str, number: int) -> None:
    """Raise Fault(DataInvalid) when a row brings what is not looked at."""
    for column in columns:
        if raw.get(column):
            raise broken(where, number, f"'{column}' is given, and this job does not look at it", "Leave it out.")


def see_prompt_alone(row: Row, answers: Iterable[Mapping[str, Any]], where: str, number: int) -> None:
    """Raise Fault(DataInvalid) when an answer shows something, where that belongs to the prompt."""
    said = "".join(str(answer.get("content", "")) for answer in answers)
    for kind, column in COLUMNS.items():
        if row.get(column) and TAGS[kind] in said:
            raise broken(where, number, f"an answer shows an {TAGS[kind]}", f"Show {column} in the prompt.")


def see_unpacked(dataset: Dataset) -> None:
    """Raise Fault(SpecInvalid) when rows that show images are to share a sequence: each must keep what it shows."""
    if dataset.packing is not None or dataset.padding_free:
        field = "dataset.packing" if dataset.packing is not None else "dataset.paddingFree"
        raise Fault(
            Reason.SPEC_INVALID,
            f"{field}: the rows show images, video or sound, and such rows are not packed",
            "Leave it out.",
        )


def see_alike(rows: Iterable[Row], kinds: Collection[Kind], strategy: str) -> None:
    """Raise Fault(SpecInvalid) when a row does not show each kind that others show, where weights are split.

    The weights that make tokens of what is shown are gathered by all processes together: one whose pass shows nothing
    of the kind would not take part, and the others wait for it.
    """
    bare = sum(any(not row.get(COLUMNS[kind]) for kind in kinds) for row in rows)
    if bare:
        named = " and ".join(sorted(COLUMNS[kind] for kind in kinds))
        raise Fault(
            Reason.SPEC_INVALID,
            f"distributed.strategy: {bare} rows show no {named} and others do, which {strategy} cannot mix",
            "Choose ddp, zero1 or zero2, or keep rows that show other things in jobs of their own.",
        )
