"""One connection to an object storage: the verbs on single objects and prefixes, each with a limit in time."""

from __future__ import annotations

import builtins
import hashlib
import logging
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.httpsession import where

from trimtab_api.contract import MANIFEST_NAME, Connection
from trimtab_store.credentials import FileCredentialProvider, FileCredentials
from trimtab_store.direct import Direct
from trimtab_store.errors import (
    ANY,
    AccessDenied,
    ConnectionInvalid,
    DigestMismatch,
    LineInvalid,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    converted,
    human,
    short_read,
)
from trimtab_store.location import Location, parse_uri
from trimtab_store.patience import Stopped, Trouble, persist
from trimtab_store.wire import Asked, Limits, Wires

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds that a failing request is tried again, unless told otherwise."""
SMALL = 64 << 20
"""Largest object that get_object takes, and longest line, in bytes."""

_CHUNK = 1 << 20
_CONNECT_TIMEOUT = 5
_READ_TIMEOUT = 60
"""Seconds without a byte after which an answer is given up and asked for again."""
_ASSEMBLY_TIMEOUT = 300
"""The same for the end of a multi-part upload, when some servers copy the whole object before they answer."""
_POOL = 32
"""Connections kept open; more threads than these would open a new one for each request."""
_AHEAD = 6
"""Objects that one thread asks for before it reads the first."""
_PARAMETERS = {"range": "Range", "if-match": "IfMatch"}
"""Headers of a GET by botocore's names for them."""
_BATCH = 1000
"""Objects that one request deletes: S3's limit."""


class ObjectInfo(NamedTuple):
    """What a listing knows of an object."""

    uri: str
    size: int
    etag: str


class SmallObject(NamedTuple):
    """An object to read as a whole."""

    uri: str
    size: int
    """Bytes that it must have."""
    etag: str | None = None
    """The version that it must be, if any."""


class S3:
    """The verbs on objects, over one client that threads may share. Made by `connect`."""

    def __init__(self, client: S3Client, direct: Direct, patience: float) -> None:
        self._direct = direct
        self.client = client
        """The client beneath, for this package alone: its errors are not yet ours."""
        self.patience = patience
        """Seconds for which a failing request is tried again."""

    def get_object(self, uri: str, *, limit: int = SMALL) -> bytes:
        """The content of a small object.

        Raises StorageError when it is larger than `limit` bytes, ObjectMissing, BucketMissing, AccessDenied, ...
        """

        def whole() -> bytes:
            with self._open(uri) as answer:
                if answer.length > limit:
                    problem = f"the object has {human(answer.length)}, more than the {human(limit)} expected here"
                    raise StorageError(uri, problem, "correct the uri")
                content = bytearray(answer.length)
                answer.fill(memoryview(content))
                return bytes(content)

        return self.ask(whole, uri, "get")

    def get_range(self, uri: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start` on. Raises DigestMismatch when the object ends before."""
        content = bytearray(length)
        self.read_into(uri, start, content)
        return bytes(content)

    def read_into(
        self,
        uri: str,
        start: int,
        buffer: bytearray | memoryview,
        *,
        etag: str | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Fill `buffer` from byte `start` on.

        `etag`: the version that it must be, else ObjectChanged. `stop`: ends the reading with Stopped.
        Raises DigestMismatch when the object ends before the buffer is full.
        """
        view = memoryview(buffer).cast("B")
        if not view:
            return

        def part() -> None:
            last = start + len(view) - 1
            with self._open(uri, f"bytes={start}-{last}", etag) as opened:
                if opened.length != len(view):
                    problem = f"the object ends before byte {last + 1} ({opened.extent})"
                    raise DigestMismatch(uri, problem, "publish it again")
                opened.fill(view, stop)

        self.ask(part, uri, "get", stop)

    def read_ahead(
        self, objects: Sequence[SmallObject], buffer: memoryview, stop: threading.Event | None = None
    ) -> Generator[memoryview]:
        """The content of these objects in turn, in the buffer's beginning: use each before the next is taken.

        Several are asked for at once, from one thread: many threads spend more on waiting for each other than on small
        objects. Nothing is tried again and no error raised: it ends before the first object that does not come as it
        should, and `read_into` is for that one and those after it. `stop` ends the reading with Stopped.
        """
        coming: deque[Asked | None] = deque()
        try:
            for number, each in enumerate(objects):
                while len(coming) < _AHEAD and number + len(coming) < len(objects):
                    coming.append(self._ask_ahead(objects[number + len(coming)]))
                asked = coming.popleft()
                view = buffer[: each.size]
                if each.size and (asked is None or not self._take_ahead(each, asked, view, stop)):
                    return
                yield view
        finally:
            for left in coming:
                if left is not None:
                    left.close()

    def put_object(self, uri: str, data: bytes) -> None:
        """Write a small object in one request."""
        self.ask(lambda: self.put_once(uri, data), uri, "put")

    def put_once(self, uri: str, data: bytes, sha256: str | None = None) -> None:
        """One attempt at `put_object`, for this package alone: its errors are not yet ours."""
        digest = sha256 or hashlib.sha256(data).hexdigest()
        if not self._direct.put(parse_uri(uri), data, digest):
            self.client.put_object(**_target(uri), Body=data)

    def stat(self, uri: str) -> ObjectInfo:
        """Size and ETag of an object. Raises ObjectMissing or BucketMissing."""
        try:
            head = self.ask(lambda: self.client.head_object(**_target(uri)), uri, "get")
        except (ObjectMissing, AccessDenied) as failure:
            self._explain(uri, failure)
            raise
        return ObjectInfo(uri, head["ContentLength"], _etag(head))

    def exists(self, uri: str) -> bool:
        """Whether the object is there. A missing bucket or refused keys raise."""
        try:
            self.stat(uri)
        except ObjectMissing:
            return False
        return True

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Every object below the prefix taken as a folder, sorted by key."""
        place = parse_uri(uri)
        for page in self._pages(place, delimiter=""):
            for found in page.get("Contents", []):
                yield ObjectInfo(Location(place.bucket, found["Key"]).uri, found["Size"], _etag(found))

    def list_folders(self, uri: str) -> Iterator[str]:
        """The uris of the folders directly below the prefix."""
        place = parse_uri(uri)
        for page in self._pages(place, delimiter="/"):
            for found in page.get("CommonPrefixes", []):
                yield Location(place.bucket, found["Prefix"].rstrip("/")).uri

    def stream(self, uri: str) -> Iterator[bytes]:
        """The content in chunks; a torn connection is taken up again where it broke."""
        trouble = Trouble(uri, "get", self.patience)
        done, size, etag = 0, -1, None
        while done != size:
            try:
                with self._open(uri, f"bytes={done}-" if done else None, etag) as answer:
                    etag, size = answer.etag, done + answer.length
                    for chunk in answer.chunks():
                        done += len(chunk)
                        trouble.over()
                        yield chunk
            except ANY as error:
                trouble.met(error)

    def open_lines(self, uri: str, *, max_line: int = SMALL) -> Iterator[str]:
        """The lines of a UTF-8 text without their ends, in bounded memory. Raises LineInvalid with the row."""
        row, tail = 0, b""
        for chunk in self.stream(uri):
            *whole, rest = chunk.split(b"\n")
            for piece in whole:
                row += 1
                yield _line(uri, row, tail + piece, max_line)
                tail = b""
            tail += rest
            if len(tail) > max_line:
                raise _too_long(uri, row + 1, max_line)
        if tail:
            yield _line(uri, row + 1, tail, max_line)

    def digest_object(self, uri: str) -> str:
        """sha256 over the content, as sha256:HEX; reads all of it."""
        digest = hashlib.sha256()
        for chunk in self.stream(uri):
            digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    def delete_object(self, uri: str) -> None:
        """Delete an object; one that is not there is fine."""
        self.ask(lambda: self.client.delete_object(**_target(uri)), uri, "delete")

    def delete_prefix(self, uri: str) -> int:
        """Delete everything below the prefix, its manifest first; returns how many objects went."""
        found = [info.uri for info in self.list(uri)]
        manifests = [each for each in found if each.endswith(f"/{MANIFEST_NAME}")]
        for each in manifests:
            self.delete_object(each)
        others = sorted(set(found) - set(manifests))
        for first in range(0, len(others), _BATCH):
            self._delete_batch(parse_uri(uri), others[first : first + _BATCH])
        return len(found)

    def close(self) -> None:
        """Let go of the connections."""
        self._direct.close()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, call: Callable[[], T], uri: str, action: str, stop: threading.Event | None = None) -> T:
        """The result of a request of this package, tried again and converted as everywhere."""
        return persist(call, uri=uri, action=action, patience=self.patience, stop=stop)

    def _open(self, uri: str, extent: str | None = None, etag: str | None = None) -> _Answer:
        """One attempt at a GET, of the version `etag` if that is given: ObjectChanged when it is another."""
        headers = _conditions(extent, etag)
        told: Any = self._direct.get(parse_uri(uri), headers)
        if told is None:
            wanted: dict[str, Any] = {_PARAMETERS[name]: value for name, value in headers.items()}
            told = self.client.get_object(**_target(uri), **wanted)
        answer = _Answer(told, uri)
        answer.must_be(etag)
        return answer

    def _ask_ahead(self, each: SmallObject) -> Asked | None:
        """Ask for a whole object; None when there is nothing to ask, or no asking."""
        if not each.size:
            return None
        try:
            return self._direct.ask(parse_uri(each.uri), _conditions(f"bytes=0-{each.size - 1}", each.etag))
        except ANY as error:
            _LOG.debug("%s: %s", each.uri, error)
            return None

    def _take_ahead(self, each: SmallObject, asked: Asked, view: memoryview, stop: threading.Event | None) -> bool:
        """Whether the whole object has come as it should."""
        try:
            told = self._direct.answer(parse_uri(each.uri), asked)
            if told is None:
                return False
            with _Answer(told, each.uri) as answer:
                answer.must_be(each.etag)
                if answer.length != each.size:
                    return False
                answer.fill(view, stop)
        except ANY as error:
            _LOG.debug("%s: %s", each.uri, error)
            return False
        return True

    def _pages(self, place: Location, delimiter: str) -> Iterator[Any]:
        token: dict[str, str] = {}
        uri = place.uri
        while True:
            query = {"Bucket": place.bucket, "Prefix": place.folder, "Delimiter": delimiter, **token}
            page: Any = self.ask(lambda query=query: self.client.list_objects_v2(**query), uri, "list")  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _delete_batch(self, place: Location, uris: builtins.list[str]) -> None:
        keys: Any = [{"Key": parse_uri(uri).key} for uri in uris]
        whole: Any = {"Objects": keys, "Quiet": True}
        answer = self.ask(lambda: self.client.delete_objects(Bucket=place.bucket, Delete=whole), place.uri, "delete")
        for refused in answer.get("Errors", []):
            uri = Location(place.bucket, refused.get("Key", "")).uri
            problem = f"the storage did not delete it ({refused.get('Code')})"
            raise StorageError(uri, problem, "allow the keys' owner to delete it")

    def _explain(self, uri: str, failure: StorageError) -> None:
        """A HEAD is answered without a reason: raise the reason that a listing of the same key gives, if any."""
        place = parse_uri(uri)
        try:
            self.ask(lambda: self.client.list_objects_v2(Bucket=place.bucket, Prefix=place.key, MaxKeys=1), uri, "list")
        except AccessDenied:
            # The keys may get but not list: what the HEAD said stands.
            raise failure from None


class _Answer:
    """One answer to a GET: its body, read once and counted."""

    def __init__(self, answer: Any, uri: str) -> None:
        self._body: Any = answer["Body"]
        self._uri = uri
        self.length: int = answer["ContentLength"]
        self.etag = _etag(answer)
        self.extent: str = answer.get("ContentRange", f"{self.length} bytes")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A body that was read to its end has given its connection back already; any other cannot be used again.
        self._body.close()

    def must_be(self, etag: str | None) -> None:
        """Raise ObjectChanged when this is another version; not every server minds If-Match."""
        if etag is not None and self.etag != etag:
            self._body.close()
            raise ObjectChanged(self._uri, "the object was replaced while it was read", "start again")

    def fill(self, view: memoryview, stop: threading.Event | None = None) -> None:
        """Read the whole body into `view`."""
        done = 0
        while done < self.length:
            if stop is not None and stop.is_set():
                raise Stopped
            count = self._body.readinto(view[done : done + _CHUNK])
            if not count:
                raise short_read(self._uri, done, self.length)
            done += count

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces."""
        done = 0
        while done < self.length:
            chunk: bytes = self._body.read(min(_CHUNK, self.length - done))
            if not chunk:
                raise short_read(self._uri, done, self.length)
            done += len(chunk)
            yield chunk


def connect(connection: Connection, *, patience: float = PATIENCE) -> S3:
    """Open a connection; makes no request.

    `patience`: seconds for which a request that gets no sound answer is tried again.
    Raises ConnectionInvalid (endpoint or CA file) and CredentialsMissing (no files in credentials_dir).
    """
    session = botocore.session.Session()
    # Nobody here reads a date, and parsing it takes a tenth of a request's time.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    if connection.credentials_dir is not None and not connection.anonymous:
        provider = FileCredentialProvider(FileCredentials(Path(connection.credentials_dir)))
        session.get_component("credential_provider").providers.insert(0, provider)
    region = connection.region or session.get_config_variable("region") or "us-east-1"
    verify, trust = _trust(connection)
    try:
        client = boto3.Session(botocore_session=session).client(
            "s3", endpoint_url=connection.endpoint, region_name=region, verify=verify, config=_config(connection)
        )
        credentials = None if connection.anonymous else session.get_credentials()
    except BotoCoreError as error:
        raise converted(error, connection.endpoint or "s3", "connection") from error
    except ValueError as error:
        problem = f"no connection can be made of this ({error})"
        raise ConnectionInvalid(
            connection.endpoint or "s3", problem, "set storage.endpoint to http(s)://HOST:PORT"
        ) from error
    client.meta.events.register("before-call.s3.CompleteMultipartUpload", _take_time)
    authorities = (verify if isinstance(verify, str) else where()) if verify else None
    wires = Wires(Limits(_CONNECT_TIMEOUT, _READ_TIMEOUT, _POOL), authorities)
    opened = S3(client, Direct(client, credentials, wires, anonymous=connection.anonymous), patience)
    if trust is not None:
        weakref.finalize(opened, trust.unlink, missing_ok=True)
    return opened


def _config(connection: Connection) -> Config:
    return Config(
        signature_version=UNSIGNED if connection.anonymous else None,
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
        # One layer tries again, ours: two would multiply their times.
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_POOL,
        tcp_keepalive=True,
        # The manifest's sha256 guards every byte; trailers would cost another pass and many servers refuse them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        parameter_validation=False,
        s3={"addressing_style": "path" if connection.path_style else "auto"},
        user_agent="trimtab",
    )


def _take_time(params: dict[str, Any], **_: object) -> None:
    params["context"]["read_timeout"] = _ASSEMBLY_TIMEOUT


def _trust(connection: Connection) -> tuple[bool | str, Path | None]:
    """What botocore calls `verify`, and the file to remove at the end: the system's certificates with ours added."""
    if not connection.verify_tls:
        return False, None
    if connection.ca_file is None:
        return True, None
    try:
        ours = Path(connection.ca_file).read_text()
        system = Path(where()).read_text()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the certificates cannot be read ({error})"
        raise ConnectionInvalid(connection.ca_file, problem, "correct storage.caBundle") from error
    if "-----BEGIN CERTIFICATE-----" not in ours:
        remedy = "put the authority's PEM certificates into the ConfigMap named by storage.caBundle"
        raise ConnectionInvalid(connection.ca_file, "there is no PEM certificate in it", remedy)
    with tempfile.NamedTemporaryFile("w", prefix="trimtab-ca-", suffix=".pem", delete=False) as both:
        both.write(f"{system}\n{ours}\n")
    return both.name, Path(both.name)


def _target(uri: str) -> dict[str, Any]:
    place = parse_uri(uri)
    return {"Bucket": place.bucket, "Key": place.key}


def _conditions(extent: str | None, etag: str | None) -> dict[str, str]:
    return {**({"range": extent} if extent else {}), **({"if-match": f'"{etag}"'} if etag else {})}


def _etag(answer: Any) -> str:
    # Listings of some servers leave out the quotes that their GETs have.
    return str(answer.get("ETag", "")).strip('"')


def _line(uri: str, row: int, raw: bytes, limit: int) -> str:
    if len(raw) > limit:
        raise _too_long(uri, row, limit)
    try:
        return raw.removesuffix(b"\r").decode("utf-8-sig" if row == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the line is not UTF-8"
        raise LineInvalid(uri, row, problem, "save the file as UTF-8") from error


def _too_long(uri: str, row: int, limit: int) -> LineInvalid:
    return LineInvalid(uri, row, f"the line is longer than {human(limit)}", "write one JSON object a line")
