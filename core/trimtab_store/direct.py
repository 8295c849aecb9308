"""The two requests of which a transfer makes thousands, sent without botocore's layers.

A plain GET and a plain PUT cost a fraction of the processor time this way, which is what bounds a transfer of many
small files. Anything but plain success is left to botocore: it asks again, knows redirects, and words the error. So is
every request when a proxy stands between.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from botocore.credentials import Credentials
from botocore.utils import get_environ_proxies, percent_encode

from trimtab_store.location import Location
from trimtab_store.signature import EMPTY, Signer
from trimtab_store.wire import Answer, Asked, Origin, Wires

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_EXPRESS = "--x-s3"
"""Directory buckets want sessions of their own."""
_OF_THE_OBJECT = frozenset({403, 404, 412, 416, 429, 500, 502, 503, 504})
"""Answers that are about the object or the moment, so that this bucket is asked directly again."""
_READ = {"ETag": "etag", "ContentRange": "content-range"}
"""Headers that this package reads, by botocore's names."""


class _Base(NamedTuple):
    """Where a bucket's keys are."""

    origin: Origin
    host: str
    """As the Host header has it."""
    path: str
    """What the keys are appended to."""


class Direct:
    """Plain requests beside a client, with the same endpoint, region and keys. Threads may share it.

    Without `credentials` everything is left to botocore, unless requests shall be unsigned (`anonymous`).
    """

    def __init__(self, client: S3Client, credentials: Credentials | None, wires: Wires, *, anonymous: bool) -> None:
        self._client = client
        self._credentials = None if anonymous else credentials
        self._anonymous = anonymous
        self._signer = Signer(client.meta.region_name)
        self._wires = wires
        self._bases: dict[str, _Base | None] = {}
        self._lock = threading.Lock()

    def get(self, place: Location, headers: Mapping[str, str]) -> dict[str, Any] | None:
        """The answer as botocore gives it, as far as this package reads it; None leaves it to botocore."""
        asked = self.ask(place, headers)
        return None if asked is None else self.answer(place, asked)

    def ask(self, place: Location, headers: Mapping[str, str]) -> Asked | None:
        """The first half of `get`, so that several answers can be under way; None leaves it to botocore."""
        return self._send("GET", place, headers)

    def answer(self, place: Location, asked: Asked) -> dict[str, Any] | None:
        """The second half of `get`."""
        answer = self._read(place, asked)
        if answer is None:
            return None
        told = {name: answer.headers[header] for name, header in _READ.items() if header in answer.headers}
        return {**told, "ContentLength": answer.length, "Body": answer}

    def put(self, place: Location, data: bytes, sha256: str) -> bool:
        """Whether the object is written; False leaves it to botocore. `sha256`: of the data, in hexadecimal digits."""
        asked = self._send("PUT", place, {}, data, sha256)
        answer = None if asked is None else self._read(place, asked)
        if answer is None:
            return False
        if answer.length:
            answer.read(answer.length)
        answer.close()
        return True

    def close(self) -> None:
        """Let go of the connections."""
        self._wires.close()

    def _send(
        self,
        method: str,
        place: Location,
        headers: Mapping[str, str],
        data: bytes | None = None,
        sha256: str = EMPTY,
    ) -> Asked | None:
        if self._credentials is None and not self._anonymous:
            return None
        base = self._base(place.bucket)
        if base is None:
            return None
        path = base.path + percent_encode(place.key, safe="/~")
        whole = {"host": base.host, **headers}
        if self._credentials is not None:
            whole = self._signer.sign(self._credentials.get_frozen_credentials(), method, path, whole, sha256)
        return self._wires.ask(base.origin, method, path, {**whole, "user-agent": "trimtab"}, data)

    def _read(self, place: Location, asked: Asked) -> Answer | None:
        answer = asked.answer()
        if answer.status in (200, 206) and answer.length is not None:
            return answer
        answer.close()
        if answer.status not in _OF_THE_OBJECT:
            self._bases[place.bucket] = None
        return None

    def _base(self, bucket: str) -> _Base | None:
        """Where the bucket's keys are; None where botocore has to ask for them."""
        with self._lock:
            if bucket not in self._bases:
                self._bases[bucket] = None if bucket.endswith(_EXPRESS) else self._ask_for_base(bucket)
            return self._bases[bucket]

    def _ask_for_base(self, bucket: str) -> _Base | None:
        # The client alone knows whether the bucket's name belongs into the host or the path.
        url = self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        if get_environ_proxies(url):
            return None
        parts = urlsplit(url)
        origin = Origin(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        return _Base(origin, parts.netloc, parts.path.removesuffix("k"))
