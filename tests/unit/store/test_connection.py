"""The verbs against a real server, and every knob of the connection."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.ports import free_port
from trimtab_api.contract import Connection
from trimtab_store import S3, StorageError, connect
from trimtab_store.errors import (
    AccessDenied,
    BucketMissing,
    ConnectionInvalid,
    CredentialsMissing,
    CredentialsWrong,
    DigestMismatch,
    LineInvalid,
    ObjectMissing,
    StorageUnreachable,
)

from .conftest import KEY, SECRET, Proxy, Server, keys_folder


def test_an_object_is_written_read_and_deleted(s3: S3, bucket: str) -> None:
    uri = f"{bucket}/folder/ä +1.txt"
    s3.put_object(uri, b"0123456789")
    assert s3.get_object(uri) == b"0123456789"
    assert s3.get_range(uri, 2, 3) == b"234"
    assert s3.stat(uri).size == 10
    assert s3.exists(uri)
    assert s3.digest_object(uri) == f"sha256:{hashlib.sha256(b'0123456789').hexdigest()}"
    s3.delete_object(uri)
    s3.delete_object(uri)
    assert not s3.exists(uri)


@pytest.mark.parametrize("key", ["a", "ä +1.txt", "a=b&c?d#e%20f", "~/.-_/(x)!*'"])
def test_plain_requests_take_the_short_way(through: S3, proxy: Proxy, bucket: str, key: str) -> None:
    through.put_object(f"{bucket}/{key}", b"content")
    assert through.get_object(f"{bucket}/{key}") == b"content"
    assert through.get_range(f"{bucket}/{key}", 1, 3) == b"ont"
    assert [method for method, _ in proxy.requests] == ["PUT", "GET", "GET"], "a longer way asks twice"


def test_a_proxy_of_the_environment_is_used(
    connection: Connection, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "")
    with connect(connection) as opened:
        opened.put_object(f"{bucket}/x", b"content")
        assert opened.get_object(f"{bucket}/x") == b"content"
    assert [method for method, path in proxy.requests if path.startswith("http://")] == ["PUT", "GET"]


def test_read_into_fills_the_very_buffer(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/object", bytes(range(256)))
    buffer = bytearray(8)
    s3.read_into(f"{bucket}/object", 100, memoryview(buffer)[2:6])
    assert buffer == bytes([0, 0, 100, 101, 102, 103, 0, 0])


def test_listing_keeps_to_the_folder(s3: S3, bucket: str) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "c"):
        s3.put_object(f"{bucket}/{key}", b"x")
    assert [info.uri for info in s3.list(f"{bucket}/a")] == [f"{bucket}/a/1", f"{bucket}/a/b/2"]
    assert list(s3.list_folders(bucket)) == [f"{bucket}/a", f"{bucket}/ab"]
    assert list(s3.list(f"{bucket}/nothing")) == []
    assert s3.delete_prefix(f"{bucket}/a") == 2
    assert [info.uri for info in s3.list(bucket)] == [f"{bucket}/ab/3", f"{bucket}/c"]


def test_a_prefix_loses_its_manifest_first(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("a/model", "a/manifest.json"):
        s3.put_object(f"{bucket}/{key}", b"x")

    def torn(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(s3, "_delete_batch", torn)
    with pytest.raises(KeyboardInterrupt):
        s3.delete_prefix(f"{bucket}/a")
    assert [info.uri for info in s3.list(bucket)] == [f"{bucket}/a/model"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\n", ["one"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\n\nthree", ["", "", "three"]),
        (b"\xef\xbb\xbfmarked\nplain", ["marked", "plain"]),
        ("ä" * 600_000 + "\nö\n", ["ä" * 600_000, "ö"]),
    ],
    ids=["empty", "no end", "end", "crlf", "blank", "byte order mark", "across chunks"],
)
def test_lines(s3: S3, bucket: str, content: bytes | str, lines: list[str]) -> None:
    s3.put_object(f"{bucket}/rows.jsonl", content.encode() if isinstance(content, str) else content)
    assert list(s3.open_lines(f"{bucket}/rows.jsonl")) == lines


@pytest.mark.parametrize(
    ("content", "row", "about"),
    [(b"fine\n\xff\xfe\n", 2, "not UTF-8"), (b"fine\n" + b"x" * 200, 2, "longer"), (b"x" * 200 + b"\n", 1, "longer")],
)
def test_a_broken_line_is_named_by_its_row(s3: S3, bucket: str, content: bytes, row: int, about: str) -> None:
    s3.put_object(f"{bucket}/rows.jsonl", content)
    with pytest.raises(LineInvalid, match=f"rows.jsonl: row {row}: .*{about}") as caught:
        list(s3.open_lines(f"{bucket}/rows.jsonl", max_line=100))
    assert caught.value.row == row


@pytest.mark.parametrize("verb", ["get_object", "stat", "digest_object"])
def test_a_missing_object_and_a_missing_bucket_are_told_apart(s3: S3, bucket: str, verb: str) -> None:
    with pytest.raises(ObjectMissing, match=f"{bucket}/none: the object does not exist"):
        getattr(s3, verb)(f"{bucket}/none")
    with pytest.raises(BucketMissing, match="s3://no-such-bucket/none: the bucket does not exist"):
        getattr(s3, verb)("s3://no-such-bucket/none")


def test_a_missing_bucket_cannot_be_listed_or_written(s3: S3) -> None:
    with pytest.raises(BucketMissing):
        list(s3.list("s3://no-such-bucket/a"))
    with pytest.raises(BucketMissing):
        s3.put_object("s3://no-such-bucket/a", b"x")


def test_a_range_beyond_the_end_is_an_error(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/short", b"0123")
    for start in (2, 100):
        with pytest.raises(DigestMismatch, match=f"{bucket}/short: the object"):
            s3.get_range(f"{bucket}/short", start, 10)


def test_a_large_object_is_not_read_into_memory(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/large", bytes(2000))
    with pytest.raises(StorageError, match=r"2\.0 KiB, more than the 1000 bytes"):
        s3.get_object(f"{bucket}/large", limit=1000)


# ------------------------------------------------------------------------------------------------ credentials


@pytest.mark.parametrize(("key", "secret"), [("OTHER", SECRET), (KEY, "wrong")])
@pytest.mark.parametrize("verb", ["get_object", "stat"])
def test_wrong_keys(connection: Connection, tmp_path: Path, bucket: str, key: str, secret: str, verb: str) -> None:
    wrong = connection.model_copy(update={"credentials_dir": keys_folder(tmp_path / "wrong", key, secret)})
    with connect(wrong) as opened, pytest.raises(CredentialsWrong, match=f"{bucket}/x: .*check the Secret"):
        getattr(opened, verb)(f"{bucket}/x")


def test_keys_are_read_again_when_they_rotate(connection: Connection, bucket: str, tmp_path: Path) -> None:
    with connect(connection) as s3:
        s3.put_object(f"{bucket}/x", b"x")
        keys_folder(tmp_path / "keys", secret="rotated away")
        with pytest.raises(CredentialsWrong):
            s3.get_object(f"{bucket}/x")
        (tmp_path / "keys/AWS_SECRET_ACCESS_KEY").unlink()
        with pytest.raises(CredentialsMissing, match="AWS_SECRET_ACCESS_KEY: missing or empty"):
            s3.get_object(f"{bucket}/x")
        keys_folder(tmp_path / "keys")
        assert s3.get_object(f"{bucket}/x") == b"x"


def test_keys_are_read_from_a_mounted_secret(connection: Connection, bucket: str, tmp_path: Path) -> None:
    """The kubelet's layout: files are links through ..data, which is swapped as a whole."""
    mount = tmp_path / "mount"
    keys_folder(mount / "..old", secret="wrong")
    keys_folder(mount / "..new")
    (mount / "..data").symlink_to("..old")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        (mount / name).symlink_to(f"..data/{name}")
    with connect(connection.model_copy(update={"credentials_dir": str(mount)})) as opened:
        with pytest.raises(CredentialsWrong):
            opened.exists(f"{bucket}/x")
        (mount / "..swap").symlink_to("..new")
        (mount / "..swap").rename(mount / "..data")
        assert not opened.exists(f"{bucket}/x")


@pytest.mark.parametrize("lacking", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_missing_keys_are_named_before_any_request(tmp_path: Path, lacking: str) -> None:
    folder = keys_folder(tmp_path / "some")
    (tmp_path / "some" / lacking).write_text("\n")
    with pytest.raises(CredentialsMissing, match=f"{lacking}: missing or empty"):
        connect(Connection(credentials_dir=folder))


def test_without_any_keys(connection: Connection, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    bare = connection.model_copy(update={"credentials_dir": None})
    with connect(bare) as opened, pytest.raises(CredentialsMissing, match=r"set storage\.anonymous"):
        opened.get_object(f"{bucket}/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with connect(bare) as opened:
        assert not opened.exists(f"{bucket}/x")


def test_unsigned_requests_are_refused_by_a_server_that_wants_keys(connection: Connection, bucket: str) -> None:
    anonymous = connection.model_copy(update={"anonymous": True})
    with connect(anonymous) as opened, pytest.raises(AccessDenied):
        opened.get_object(f"{bucket}/x")


# ------------------------------------------------------------------------------------------------ endpoint, TLS


def test_an_endpoint_that_refuses_is_unreachable_after_its_patience(connection: Connection) -> None:
    dead = connection.model_copy(update={"endpoint": f"http://127.0.0.1:{free_port()}"})
    with connect(dead, patience=1) as opened, pytest.raises(StorageUnreachable, match=r"check storage\.endpoint"):
        opened.get_object("s3://bucket/x")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "ftp://"])
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(ConnectionInvalid, match=r"set storage\.endpoint"):
        connect(Connection(endpoint=endpoint))


@pytest.mark.parametrize("content", [None, b"no certificate", b"\xff\xfe"])
def test_a_certificate_file_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(ConnectionInvalid, match=r"storage\.caBundle"):
        connect(Connection(ca_file=str(tmp_path / "ca.crt")))


def test_tls_by_a_private_authority(tmp_path: Path, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    options = ("--cert", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem"))
    server = Server(tmp_path / "served", options=options)
    (server.root / "bucket").mkdir(parents=True)
    server.start()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    try:
        there = connection.model_copy(update={"endpoint": f"https://127.0.0.1:{server.port}"})
        with connect(there) as opened, pytest.raises(ConnectionInvalid, match=r"not trusted.*set storage\.caBundle"):
            opened.exists("s3://bucket/x")
        with connect(there) as opened, pytest.raises(ConnectionInvalid, match=r"not trusted.*set storage\.caBundle"):
            opened.get_object("s3://bucket/x")
        with connect(there.model_copy(update={"ca_file": str(tmp_path / "cert.pem")})) as opened:
            opened.put_object("s3://bucket/x", b"x")
            assert opened.exists("s3://bucket/x")
        with connect(there.model_copy(update={"verify_tls": False})) as opened:
            assert opened.get_object("s3://bucket/x") == b"x"
            with pytest.warns(Warning, match="Unverified HTTPS"):
                assert opened.exists("s3://bucket/x")
    finally:
        server.stop()
