"""What can go wrong with object storage, in our words.

Every error of boto, urllib3 and the local disk that this package meets is turned into one of these classes by
`converted` and `converted_disk`, and nowhere else. A message says what is wrong with which object; `remedy` says
what to do; `transient` says whether waiting may mend it.
"""

from __future__ import annotations

import errno
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import botocore.exceptions as boto
import urllib3.exceptions as http
from botocore.parsers import ResponseParserError

from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit


class StorageError(Exception):
    """Base of all errors of this package."""

    transient: ClassVar[bool] = False
    """Waiting may mend it."""
    reason: ClassVar[Reason] = Reason.STORAGE_FAILED
    """The condition's reason when it is about an input."""
    exit: ClassVar[Exit] = Exit.STORAGE_FAILED
    """The exit code of a pod that ends with it, unless the pod knows better."""

    def __init__(self, uri: str, problem: str, remedy: str) -> None:
        super().__init__(f"{uri}: {problem}; {remedy}")
        self.uri = uri
        """s3://BUCKET/KEY, or the local path for DiskFull and LocalFileFailed."""
        self.problem = problem
        """What is wrong, without the uri."""
        self.remedy = remedy
        """What to do."""


class UriInvalid(StorageError):
    """The text is not s3://BUCKET/KEY."""

    reason = Reason.SPEC_INVALID
    exit = Exit.SPEC_INVALID


class ConnectionInvalid(StorageError):
    """The connection itself cannot be: endpoint is no URL, CA file is unreadable, the certificate is not trusted."""

    reason = Reason.STORAGE_UNREACHABLE
    exit = Exit.SPEC_INVALID


class BucketMissing(StorageError):
    """The bucket does not exist."""

    reason = Reason.BUCKET_MISSING
    exit = Exit.SPEC_INVALID


class ObjectMissing(StorageError):
    """The object does not exist, or no object has the prefix."""

    reason = Reason.OBJECT_MISSING
    exit = Exit.SPEC_INVALID


class AccessDenied(StorageError):
    """The keys are known, but may not do this."""

    reason = Reason.CREDENTIALS_WRONG
    exit = Exit.CREDENTIALS


class CredentialsMissing(StorageError):
    """No keys: neither files nor a ServiceAccount that gives some."""

    reason = Reason.CREDENTIALS_MISSING
    exit = Exit.CREDENTIALS


class CredentialsWrong(StorageError):
    """The keys are unknown, expired, or do not fit each other."""

    reason = Reason.CREDENTIALS_WRONG
    exit = Exit.CREDENTIALS


class StorageUnreachable(StorageError):
    """No answer, or only errors of the server's own, for as long as the connection's patience lasts."""

    transient = True
    reason = Reason.STORAGE_UNREACHABLE


class ShortRead(StorageError):
    """Fewer bytes than the server promised for this answer, again and again."""

    transient = True
    reason = Reason.DIGEST_MISMATCH


class UploadLost(StorageError):
    """The server forgot a multi-part upload, as servers do that keep the parts in memory and are restarted."""


class ObjectChanged(StorageError):
    """The object was replaced while it was read, so that what was read is of no version."""

    reason = Reason.INPUT_CHANGED
    exit = Exit.DATA_INVALID


class DigestMismatch(StorageError):
    """The bytes, or the manifest, are not what they must be."""

    reason = Reason.DIGEST_MISMATCH
    exit = Exit.MODEL_INVALID


class DiskFull(StorageError):
    """The local disk, or the cache's limit, has no room. `missing_bytes` says how much more is needed (0: unknown)."""

    reason = Reason.DISK_FULL
    exit = Exit.DISK_FULL

    def __init__(self, uri: str, problem: str, remedy: str, missing_bytes: int = 0) -> None:
        super().__init__(uri, problem, remedy)
        self.missing_bytes = missing_bytes


class LocalFileFailed(StorageError):
    """A local file cannot be read or written, for another reason than a full disk."""

    reason = Reason.CRASHED
    exit = Exit.CRASHED


class NotAnArtifact(StorageError):
    """The prefix has no manifest.json, or one that does not parse: nothing says that it is complete."""

    reason = Reason.NOT_AN_ARTIFACT
    exit = Exit.MODEL_INVALID


class UnsafePath(StorageError):
    """A manifest or a listing names a path that leaves its folder, or that cannot be a file."""

    reason = Reason.MODEL_INVALID
    exit = Exit.MODEL_INVALID


class LineInvalid(StorageError):
    """A line of a text is not UTF-8, or too long; `row` counts from 1."""

    reason = Reason.DATA_INVALID
    exit = Exit.DATA_INVALID

    def __init__(self, uri: str, row: int, problem: str, remedy: str) -> None:
        super().__init__(uri, f"row {row}: {problem}", remedy)
        self.row = row


class UnsafeFormat(StorageError):
    """Weights are there only as pickle, which runs code when it is opened."""

    reason = Reason.UNSAFE_FORMAT
    exit = Exit.MODEL_INVALID


_KEYS = "check the Secret named by storage.credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
_SERVER = "check storage.endpoint, network policies and the server"

_CODES: dict[str, tuple[type[StorageError], str, str]] = {
    "NoSuchBucket": (BucketMissing, "the bucket does not exist", "create it, or correct the uri"),
    "NoSuchKey": (ObjectMissing, "the object does not exist", "upload it, or correct the uri"),
    "InvalidAccessKeyId": (CredentialsWrong, "the storage does not know the access key", _KEYS),
    "SignatureDoesNotMatch": (CredentialsWrong, "the secret key does not belong to the access key", _KEYS),
    "ExpiredToken": (CredentialsWrong, "the session token has expired", "renew the Secret"),
    "InvalidToken": (CredentialsWrong, "the session token is not valid", "renew the Secret"),
    "TokenRefreshRequired": (CredentialsWrong, "the session token must be renewed", "renew the Secret"),
    "AuthorizationHeaderMalformed": (
        CredentialsWrong,
        "the storage refuses the signature's form, usually because of another region",
        "set storage.region",
    ),
    "RequestTimeTooSkewed": (
        AccessDenied,
        "the clock of this node and the storage's differ too much",
        "set the node's clock",
    ),
    "AccountProblem": (AccessDenied, "the storage's account is blocked", "ask the storage's owner"),
    "AllAccessDisabled": (AccessDenied, "all access is switched off", "ask the storage's owner"),
    "InvalidBucketName": (UriInvalid, "this cannot be a bucket's name", "correct the uri"),
    "KeyTooLongError": (UriInvalid, "the key is longer than 1024 bytes", "shorten the uri"),
    "InvalidRange": (DigestMismatch, "the object is shorter than the range asked for", "publish it again"),
    "UnsupportedAlgorithm": (
        AccessDenied,
        "the storage takes no request of this form",
        "name a Secret in storage.credentials",
    ),
    "NoSuchUpload": (UploadLost, "the storage has forgotten the upload", "start it again"),
    "InvalidPart": (UploadLost, "the storage has forgotten a part of the upload", "start it again"),
    "PreconditionFailed": (ObjectChanged, "the object was replaced while it was read", "start again"),
    "EntityTooLarge": (StorageError, "the object is larger than the storage takes", "use smaller files"),
    "QuotaExceeded": (StorageError, "the storage's quota is used up", "free some room in the storage"),
}

_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
    }
)

_NOT_ANSWERED = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    ResponseParserError,
    http.HTTPError,
    OSError,
)
"""What boto, urllib3 and the sockets below raise when a request got no whole answer."""

BOUNDARY: tuple[type[Exception], ...] = (boto.BotoCoreError, boto.ClientError, *_NOT_ANSWERED)
"""Every exception that a request may end with before it is converted."""

ANY: tuple[type[Exception], ...] = (StorageError, *BOUNDARY)
"""The same, and what was converted further below."""


def converted(error: Exception, uri: str, action: str) -> StorageError:
    """Our error for one of BOUNDARY that came of `action` ("get", "list", ...) on `uri`."""
    if isinstance(error, boto.ClientError):
        return _of_answer(error, uri, action)
    if isinstance(error, boto.IncompleteReadError):
        return short_read(uri, error.kwargs["actual_bytes"], error.kwargs["expected_bytes"])
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        remedy = "name a Secret in storage.credentials, give the ServiceAccount a role, or set storage.anonymous"
        return CredentialsMissing(uri, "there are no credentials for the storage", remedy)
    if isinstance(error, boto.CredentialRetrievalError | boto.TokenRetrievalError):
        return CredentialsMissing(uri, f"no credentials could be had ({_brief(error)})", _KEYS)
    if _untrusted(error):
        remedy = "set storage.caBundle to the authority that signed it"
        return ConnectionInvalid(uri, f"the server's certificate is not trusted ({_brief(error)})", remedy)
    if isinstance(error, _NOT_ANSWERED):
        return StorageUnreachable(uri, f"the storage did not answer the {action} ({_brief(error)})", _SERVER)
    return ConnectionInvalid(uri, f"the {action} cannot be sent ({_brief(error)})", _SERVER)


def _of_answer(error: boto.ClientError, uri: str, action: str) -> StorageError:
    answer: Any = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if error.operation_name.startswith("AssumeRole"):
        remedy = "check the role that the ServiceAccount is annotated with, and its trust policy"
        return CredentialsWrong(uri, f"the ServiceAccount's role was refused ({code})", remedy)
    if code in _CODES:
        kind, problem, remedy = _CODES[code]
        return kind(uri, f"{problem} ({action}: {code})", remedy)
    if code in _TRANSIENT_CODES or status == 429 or status >= 500:
        return StorageUnreachable(uri, f"the storage answered the {action} with {status} {code}", _SERVER)
    return _of_status(status, code, uri, action)


def _of_status(status: int, code: str, uri: str, action: str) -> StorageError:
    if status == 403 or status == 401:
        remedy = f"allow the keys' owner to {action} this, or correct the uri"
        return AccessDenied(uri, f"the keys may not {action} this ({code or status})", remedy)
    if status == 404:
        return ObjectMissing(uri, f"the object does not exist ({action}: {code})", "upload it, or correct the uri")
    if status == 412:
        return ObjectChanged(uri, "the object was replaced while it was read", "start again")
    if status in (301, 307):
        return ConnectionInvalid(uri, f"the bucket is in another region ({code})", "set storage.region")
    return StorageError(uri, f"the storage refused the {action} with {status} {code}", _SERVER)


def _untrusted(error: BaseException | None) -> bool:
    """Whether a certificate that did not verify is the cause: waiting does not mend it."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        wrapped = getattr(error, "kwargs", {}).get("error") if isinstance(error, boto.BotoCoreError) else None
        error = error.__cause__ or error.__context__ or (wrapped if isinstance(wrapped, BaseException) else None)
    return False


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def short_read(uri: str, got: int, promised: int) -> ShortRead:
    """The error for an answer that broke off."""
    problem = f"the storage sent {got} of {promised} bytes and hung up"
    return ShortRead(uri, problem, "check the server and what stands between")


def disk_full(path: Path, needed: int, free: int) -> DiskFull:
    """The error for `needed` bytes wanted below `path` where only `free` are left."""
    missing = max(needed - free, 0)
    problem = f"{human(needed)} are needed and {human(free)} are free: {human(missing)} are missing"
    return DiskFull(str(path), problem, "raise the pod's ephemeral-storage, or free the disk", missing)


@contextmanager
def converted_disk(path: Path) -> Iterator[None]:
    """Turn an OSError of the local disk within the block into DiskFull or LocalFileFailed about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing(path)).free
            problem = f"the disk ran full while writing ({human(free)} free)"
            remedy = "raise the pod's ephemeral-storage, or free the disk"
            raise DiskFull(str(path), problem, remedy) from error
        raise LocalFileFailed(str(path), _brief(error), "check that the file exists and may be used") from error


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists, for questions about its disk."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def human(size: int) -> str:
    """A size in bytes as people write it: 1.5 GiB."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
