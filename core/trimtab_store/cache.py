"""Artifacts on the local disk, found by digest, shared by every process of the node."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from trimtab_store.connection import S3
from trimtab_store.progress import Progress


class CacheEntry:
    """An artifact in the cache, kept there until `release` or the end of this process."""

    path: Path
    """The folder with the files; read only."""
    digest: str
    """sha256:HEX."""

    def release(self) -> None:
        """Allow the entry to be evicted; calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Cache:
    """A folder of artifacts, each under `sha256-HEX/`."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        raise NotImplementedError

    def get(
        self,
        s3: S3,
        uri: str,
        *,
        expected_digest: str | None = None,
        safetensors_only: bool = False,
        foreign: bool = False,
        progress: Progress | None = None,
        wait: float = 3600.0,
    ) -> CacheEntry:
        """The artifact at `uri`, fetched when it is not here yet, leased to the caller.

        `wait`: seconds to wait for another process that is fetching the same.
        Raises what `fetch` raises, and UnsafeFormat with `safetensors_only`.
        """
        raise NotImplementedError
