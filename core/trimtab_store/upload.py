"""From a folder into object storage: parallel, multi-part, each file read once, in bounded memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trimtab_api.contract import MANIFEST_NAME, Manifest, ManifestFile
from trimtab_store.artifact import check_paths, retract, write_manifest
from trimtab_store.connection import S3
from trimtab_store.errors import BOUNDARY, LocalFileFailed, UploadLost, converted, converted_disk
from trimtab_store.gang import Gang, OrderedDigest
from trimtab_store.location import join, parse_uri
from trimtab_store.progress import Meter, Progress

_LOG = logging.getLogger(__name__)

_THREADS = 4
_PART = 16 << 20
"""Bytes of a part: large, because each one costs a request; each thread holds one."""
_MOST_PARTS = 10_000
"""S3's limit for one object."""
_ROUNDS = 3
"""How often a file is begun whose upload the server forgets."""


def upload_files(
    s3: S3, folder: Path, uri: str, *, files: Iterable[str] | None = None, progress: Progress | None = None
) -> list[ManifestFile]:
    """Upload files of `folder` (all, or the relative paths in `files`) below `uri`; returns them in order of path.

    Raises LocalFileFailed, AccessDenied, StorageUnreachable, ... ; parts already sent are then thrown away.
    """
    paths = sorted(_walk(folder) if files is None else set(files))
    check_paths(uri, paths)
    sendings = [_Sending(s3, folder / path, path, join(uri, path)) for path in paths]
    meter = Meter(sum(sending.size for sending in sendings), progress)
    for _ in range(_ROUNDS):
        _send_all([sending for sending in sendings if not sending.arrived], meter)
    return [sending.result() for sending in sendings]


def publish(
    s3: S3,
    folder: Path,
    uri: str,
    made_by: dict[str, Any],
    *,
    files: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make `folder` the artifact at `uri`: retract what was there, upload, write the manifest last."""
    retract(s3, uri)
    return write_manifest(s3, uri, upload_files(s3, folder, uri, files=files, progress=progress), made_by)


class _Sending:
    """One file on its way, shared by the threads that send its parts."""

    def __init__(self, s3: S3, source: Path, path: str, uri: str) -> None:
        self._s3 = s3
        self._source = source
        self._path = path
        self._uri = uri
        self._lock = threading.Lock()
        with converted_disk(source):
            self.size = source.stat().st_size
        self._part_size = max(_PART, -(-self.size // _MOST_PARTS))
        self.count = max(-(-self.size // self._part_size), 1)
        """Number of parts; a single one is sent as a plain object."""
        self.arrived = False
        """The whole object is in place."""
        self._lost: UploadLost | None = None

    def begin(self, stop: threading.Event) -> None:
        """Open the file for one round."""
        with converted_disk(self._source):
            self._descriptor = os.open(self._source, os.O_RDONLY | os.O_CLOEXEC)
        self._unread = self.count
        self._stop = stop
        self._digest = OrderedDigest(stop)
        self._upload_id: str | None = None
        self._etags: dict[int, str] = {}
        self._lost = None

    def send(self, number: int) -> int:
        """Read, digest and send one part; the thread that sends the last one completes the object."""
        offset = (number - 1) * self._part_size
        data = self._read(offset, min(self._part_size, self.size - offset))
        self._digest.feed(offset, data)
        self._close_when_read()
        try:
            self._deliver(number, data)
        except UploadLost as error:
            self._lost = error
        return len(data)

    def end(self) -> None:
        """Close the file; throw away the parts of an object that is not complete."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._upload_id is None or self.arrived:
            return
        try:
            self._s3.client.abort_multipart_upload(**self._target(), UploadId=self._upload_id)
        except BOUNDARY as error:
            # Another error is on its way to the caller, and the storage expires such parts by itself.
            _LOG.info("%s", converted(error, self._uri, "abort"))

    def result(self) -> ManifestFile:
        """The manifest's line. Raises UploadLost when the server forgot the upload each time."""
        if not self.arrived:
            raise self._lost or UploadLost(self._uri, "the upload did not end", "start it again")
        return ManifestFile(path=self._path, size=self.size, sha256=self._digest.hexdigest())

    def _read(self, offset: int, length: int) -> bytes:
        with converted_disk(self._source):
            data = os.pread(self._descriptor, length, offset)
            size = os.fstat(self._descriptor).st_size
        if len(data) != length or size != self.size:
            problem = f"the file changed while it was uploaded ({self.size} bytes before, {size} now)"
            raise LocalFileFailed(str(self._source), problem, "publish a folder that nothing writes to")
        return data

    def _close_when_read(self) -> None:
        with self._lock:
            self._unread -= 1
            if self._unread == 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _deliver(self, number: int, data: bytes) -> None:
        client, target = self._s3.client, self._target()
        if self.count == 1:
            digest = self._digest.hexdigest()
            self._ask(lambda: self._s3.put_once(self._uri, data, digest))
            self.arrived = True
            return
        if self._lost is not None:
            return
        part: dict[str, Any] = {**target, "UploadId": self._opened(), "PartNumber": number}
        etag = self._ask(lambda: client.upload_part(**part, Body=data))["ETag"]
        with self._lock:
            self._etags[number] = etag
            complete = len(self._etags) == self.count
        if complete:
            parts: Any = [{"PartNumber": each, "ETag": self._etags[each]} for each in sorted(self._etags)]
            whole = {**target, "UploadId": self._upload_id, "MultipartUpload": {"Parts": parts}}
            self._ask(lambda: client.complete_multipart_upload(**whole))
            self.arrived = True

    def _opened(self) -> str:
        with self._lock:
            if self._upload_id is None:
                begun = self._ask(lambda: self._s3.client.create_multipart_upload(**self._target()))
                self._upload_id = begun["UploadId"]
            return self._upload_id

    def _ask(self, call: Any) -> Any:
        return self._s3.ask(call, self._uri, "put", self._stop)

    def _target(self) -> dict[str, Any]:
        place = parse_uri(self._uri)
        return {"Bucket": place.bucket, "Key": place.key}


class _Part(NamedTuple):
    """A stretch of a file."""

    sending: _Sending
    number: int


def _send_all(sendings: list[_Sending], meter: Meter) -> None:
    """One round: send every part of every file; those that the server forgot have not arrived afterwards."""
    begun: list[_Sending] = []
    gang: Gang[_Part] = Gang(_THREADS, lambda part: meter.add(part.sending.send(part.number)))

    def parts() -> Iterator[_Part]:
        for sending in sendings:
            sending.begin(gang.stop)
            begun.append(sending)
            for number in range(1, sending.count + 1):
                yield _Part(sending, number)

    try:
        gang.run(parts())
    finally:
        for sending in begun:
            sending.end()


def _walk(folder: Path) -> Iterator[str]:
    """Every regular file below the folder, as a path relative to it, but for a manifest of earlier times."""
    if not folder.is_dir():
        raise LocalFileFailed(str(folder), "there is no such folder", "correct the path")
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative != MANIFEST_NAME:
            yield relative
