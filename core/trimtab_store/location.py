"""s3://BUCKET/KEY: the one way in which this package says where something is."""

from __future__ import annotations

import re
from typing import NamedTuple

from trimtab_store.errors import UriInvalid

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class Location(NamedTuple):
    """A bucket and a key (or prefix) within it; the key never begins with a slash and may be empty."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """The location as text."""
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"

    @property
    def folder(self) -> str:
        """The key as a prefix that only what lies below it can have: empty, or with one slash at its end."""
        return f"{self.key.rstrip('/')}/" if self.key.rstrip("/") else ""


def parse_uri(uri: str) -> Location:
    """Split s3://BUCKET/KEY.

    Raises UriInvalid when there is no scheme, no bucket, or a name that cannot be a bucket's.
    """
    remedy = "write s3://BUCKET/KEY, for example s3://models/llama"
    if not uri.startswith("s3://"):
        raise UriInvalid(uri, "this is not an s3 uri", remedy)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UriInvalid(uri, f"{bucket!r} cannot be a bucket's name", remedy)
    return Location(bucket, key.lstrip("/"))


def join(uri: str, path: str) -> str:
    """The uri of `path` below the prefix `uri`."""
    return f"{uri.rstrip('/')}/{path}"
