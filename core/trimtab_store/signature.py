"""AWS Signature Version 4 for the headers of a plain request.

It is botocore's arithmetic without its request objects, of which one costs more than the rest of a small transfer's
request together; the tests hold it against botocore's, byte by byte.
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping

from botocore.credentials import ReadOnlyCredentials

EMPTY = hashlib.sha256().hexdigest()
"""Digest of no body."""


class Signer:
    """Signs for one region. Threads may share it."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._derived = ("", "", b"")

    def sign(
        self, keys: ReadOnlyCredentials, method: str, path: str, headers: Mapping[str, str], sha256: str
    ) -> dict[str, str]:
        """The headers to send: those given, all of them signed, and those of the signature.

        `path` is percent-encoded and has no query; `headers` has lower-case names, among them host; `sha256` is the
        body's digest in hexadecimal digits.
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        whole = {**headers, "x-amz-content-sha256": sha256, "x-amz-date": stamp}
        if keys.token:
            whole["x-amz-security-token"] = keys.token
        names = sorted(whole)
        lines = "".join(f"{name}:{whole[name]}\n" for name in names)
        signed = ";".join(names)
        asked = hashlib.sha256(f"{method}\n{path}\n\n{lines}\n{signed}\n{sha256}".encode()).hexdigest()
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        key = self._key(keys.secret_key or "", stamp[:8])
        signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{asked}".encode(), "sha256").hex()
        whole["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        )
        return whole

    def _key(self, secret: str, day: str) -> bytes:
        known_secret, known_day, key = self._derived
        if (known_secret, known_day) != (secret, day):
            key = f"AWS4{secret}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived = (secret, day, key)
        return key
