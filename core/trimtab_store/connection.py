"""One connection to an object storage: the verbs on single objects and prefixes, each with a limit in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Self

from trimtab_api.contract import Connection

PATIENCE = 120.0
"""Seconds that a failing request is tried again, unless told otherwise."""
SMALL = 64 << 20
"""Largest object that get_object takes, and longest line, in bytes."""


class ObjectInfo(NamedTuple):
    """What a listing knows of an object."""

    uri: str
    size: int
    etag: str


class S3:
    """The verbs on objects, over one client that threads may share. Made by `connect`."""

    def get_object(self, uri: str, *, limit: int = SMALL) -> bytes:
        """The content of a small object.

        Raises StorageError when it is larger than `limit` bytes, ObjectMissing, BucketMissing, AccessDenied, ...
        """
        raise NotImplementedError

    def get_range(self, uri: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start` on. Raises ShortRead when the object ends before."""
        raise NotImplementedError

    def read_into(self, uri: str, start: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from byte `start` on. Raises ShortRead when the object ends before."""
        raise NotImplementedError

    def put_object(self, uri: str, data: bytes) -> None:
        """Write a small object in one request."""
        raise NotImplementedError

    def stat(self, uri: str) -> ObjectInfo:
        """Size and ETag of an object. Raises ObjectMissing or BucketMissing."""
        raise NotImplementedError

    def exists(self, uri: str) -> bool:
        """Whether the object is there. A missing bucket or refused keys raise."""
        raise NotImplementedError

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Every object below the prefix taken as a folder, sorted by key."""
        raise NotImplementedError

    def list_folders(self, uri: str) -> Iterator[str]:
        """The uris of the folders directly below the prefix."""
        raise NotImplementedError

    def stream(self, uri: str) -> Iterator[bytes]:
        """The content in chunks; a torn connection is taken up again where it broke."""
        raise NotImplementedError

    def open_lines(self, uri: str, *, max_line: int = SMALL) -> Iterator[str]:
        """The lines of a UTF-8 text without their ends, in bounded memory. Raises LineInvalid with the row."""
        raise NotImplementedError

    def digest_object(self, uri: str) -> str:
        """sha256 over the content, as sha256:HEX; reads all of it."""
        raise NotImplementedError

    def delete_object(self, uri: str) -> None:
        """Delete an object; one that is not there is fine."""
        raise NotImplementedError

    def delete_prefix(self, uri: str) -> int:
        """Delete everything below the prefix, its manifest first; returns how many objects went."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connections."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(connection: Connection, *, patience: float = PATIENCE) -> S3:
    """Open a connection; makes no request.

    `patience`: seconds for which a request that gets no sound answer is tried again.
    Raises ConnectionInvalid (endpoint or CA file) and CredentialsMissing (no files in credentials_dir).
    """
    raise NotImplementedError
