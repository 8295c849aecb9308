"""The two requests of which a transfer makes thousands, signed and sent without botocore's layers above.

A plain GET and a plain PUT cost half the processor time this way, which is what bounds a transfer of many small
files. Anything but plain success is left to botocore: it asks again, knows redirects, and words the error.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.httpsession import URLLib3Session
from botocore.response import StreamingBody
from botocore.utils import percent_encode

from trimtab_store.location import Location

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_EXPRESS = "--x-s3"
"""Directory buckets want sessions of their own."""
_OF_THE_OBJECT = frozenset({403, 404, 412, 416, 429, 500, 502, 503, 504})
"""Answers that are about the object or the moment, so that this bucket is asked directly again."""


class Direct:
    """Plain requests beside a client, with the same endpoint, region and keys. Threads may share it.

    Without `credentials` everything is left to botocore, unless requests shall be unsigned (`anonymous`).
    """

    def __init__(
        self, client: S3Client, credentials: Credentials | None, http: URLLib3Session, *, anonymous: bool
    ) -> None:
        self._client = client
        self._credentials = None if anonymous else credentials
        self._anonymous = anonymous
        self._http = http
        self._bases: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def get(self, place: Location, headers: Mapping[str, str]) -> dict[str, Any] | None:
        """The answer as botocore gives it, as far as this package reads it; None leaves it to botocore."""
        answer = self._send("GET", place, headers, None)
        if answer is None or "Content-Length" not in answer.headers:
            return None
        length = answer.headers["Content-Length"]
        told: dict[str, Any] = {"ContentLength": int(length), "Body": StreamingBody(answer.raw, length)}
        told["ETag"] = answer.headers.get("ETag", "")
        if "Content-Range" in answer.headers:
            told["ContentRange"] = answer.headers["Content-Range"]
        return told

    def put(self, place: Location, data: bytes) -> bool:
        """Whether the object is written; False leaves it to botocore."""
        answer = self._send("PUT", place, {}, data)
        if answer is None:
            return False
        answer.raw.drain_conn()
        return True

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def _send(self, method: str, place: Location, headers: Mapping[str, str], data: bytes | None) -> Any:
        if self._credentials is None and not self._anonymous:
            return None
        base = self._base(place.bucket)
        if base is None:
            return None
        request = AWSRequest(
            method,
            base + percent_encode(place.key, safe="/~"),
            headers={**headers, "User-Agent": "trimtab"},
            data=data,
            stream_output=True,
        )
        if self._credentials is not None:
            frozen = self._credentials.get_frozen_credentials()
            S3SigV4Auth(frozen, "s3", self._client.meta.region_name).add_auth(request)
        answer = self._http.send(request.prepare())
        if answer.status_code in (200, 206):
            return answer
        answer.raw.close()
        if answer.status_code not in _OF_THE_OBJECT:
            self._bases[place.bucket] = None
        return None

    def _base(self, bucket: str) -> str | None:
        """The URL that the bucket's keys are appended to; None where botocore has to do it."""
        with self._lock:
            if bucket not in self._bases:
                self._bases[bucket] = None if bucket.endswith(_EXPRESS) else self._ask_for_base(bucket)
            return self._bases[bucket]

    def _ask_for_base(self, bucket: str) -> str:
        # The client alone knows whether the bucket's name belongs into the host or the path.
        url = self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path.removesuffix("k"), "", ""))
