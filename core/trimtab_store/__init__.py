"""Artifacts in object storage: connection, manifest, transfer, cache. The only room that knows boto3."""

from trimtab_store.artifact import (
    Checkpoint,
    Identity,
    find_checkpoints,
    identify,
    read_manifest,
    retract,
    write_manifest,
)
from trimtab_store.cache import Cache, CacheEntry
from trimtab_store.connection import S3, ObjectInfo, connect
from trimtab_store.download import fetch
from trimtab_store.errors import StorageError
from trimtab_store.location import Location, parse_uri
from trimtab_store.progress import Progress
from trimtab_store.upload import publish, upload_files

__all__ = [
    "S3",
    "Cache",
    "CacheEntry",
    "Checkpoint",
    "Identity",
    "Location",
    "ObjectInfo",
    "Progress",
    "StorageError",
    "connect",
    "fetch",
    "find_checkpoints",
    "identify",
    "parse_uri",
    "publish",
    "read_manifest",
    "retract",
    "upload_files",
    "write_manifest",
]
