"""The table from what boto, urllib3 and the disk raise to what people read."""

from __future__ import annotations

import errno
import inspect
from pathlib import Path

import botocore.exceptions as boto
import pytest
import urllib3.exceptions as http

from trimtab_api.conditions import Reason
from trimtab_api.contract import RETRIABLE, Exit
from trimtab_store import errors
from trimtab_store.errors import StorageError, converted, converted_disk, human


def answered(code: str, status: int, operation: str = "GetObject") -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        operation,
    )


@pytest.mark.parametrize(
    ("error", "kind", "transient"),
    [
        (answered("NoSuchBucket", 404), errors.BucketMissing, False),
        (answered("NoSuchKey", 404), errors.ObjectMissing, False),
        (answered("404", 404), errors.ObjectMissing, False),
        (answered("AccessDenied", 403), errors.AccessDenied, False),
        (answered("403", 403), errors.AccessDenied, False),
        (answered("InvalidAccessKeyId", 403), errors.CredentialsWrong, False),
        (answered("SignatureDoesNotMatch", 403), errors.CredentialsWrong, False),
        (answered("ExpiredToken", 400), errors.CredentialsWrong, False),
        (answered("InvalidIdentityToken", 400, "AssumeRoleWithWebIdentity"), errors.CredentialsWrong, False),
        (answered("RequestTimeTooSkewed", 403), errors.AccessDenied, False),
        (answered("PermanentRedirect", 301), errors.ConnectionInvalid, False),
        (answered("InvalidRange", 416), errors.DigestMismatch, False),
        (answered("412", 412), errors.ObjectChanged, False),
        (answered("NoSuchUpload", 404), errors.UploadLost, False),
        (answered("SlowDown", 503), errors.StorageUnreachable, True),
        (answered("InternalError", 500), errors.StorageUnreachable, True),
        (answered("RequestTimeout", 400), errors.StorageUnreachable, True),
        (answered("", 502), errors.StorageUnreachable, True),
        (answered("", 429), errors.StorageUnreachable, True),
        (answered("Strange", 418), StorageError, False),
        (boto.NoCredentialsError(), errors.CredentialsMissing, False),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), errors.CredentialsMissing, False),
        (boto.CredentialRetrievalError(provider="p", error_msg="e"), errors.CredentialsMissing, False),
        (boto.EndpointConnectionError(endpoint_url="u"), errors.StorageUnreachable, True),
        (boto.ConnectTimeoutError(endpoint_url="u"), errors.StorageUnreachable, True),
        (boto.ReadTimeoutError(endpoint_url="u"), errors.StorageUnreachable, True),
        (boto.ConnectionClosedError(endpoint_url="u"), errors.StorageUnreachable, True),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), errors.ShortRead, True),
        (http.ProtocolError("broken"), errors.StorageUnreachable, True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), errors.StorageUnreachable, True),
        (TimeoutError("slow"), errors.StorageUnreachable, True),
        (boto.ParamValidationError(report="r"), errors.ConnectionInvalid, False),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, Exception) else "",
)
def test_each_error_becomes_one_of_ours(error: Exception, kind: type[StorageError], transient: bool) -> None:
    ours = converted(error, "s3://bucket/key", "get")
    assert type(ours) is kind
    assert ours.transient is transient
    assert str(ours) == f"s3://bucket/key: {ours.problem}; {ours.remedy}"
    assert ours.problem
    assert ours.remedy


def test_every_class_has_a_documented_word_and_a_code() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, StorageError)]
    assert len(classes) > 15
    for each in classes:
        assert isinstance(each.reason, Reason)
        assert isinstance(each.exit, Exit)
        assert each.exit != Exit.OK
        if each.transient:
            assert each.exit in RETRIABLE


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, errors.DiskFull), (errno.EDQUOT, errors.DiskFull), (errno.EACCES, errors.LocalFileFailed)],
)
def test_errors_of_the_disk(tmp_path: Path, number: int, kind: type[StorageError]) -> None:
    with pytest.raises(kind, match=str(tmp_path)), converted_disk(tmp_path / "missing/file"):
        raise OSError(number, "no")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_as_people_write_them(size: int, text: str) -> None:
    assert human(size) == text
