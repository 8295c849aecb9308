"""What the first server lacks, against moto: pages, versions by ETag, smallest parts, roles of a ServiceAccount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.ports import free_port
from trimtab_api.contract import Connection
from trimtab_store import S3, connect, fetch, publish
from trimtab_store.errors import CredentialsWrong, ObjectChanged, StorageUnreachable

from .conftest import TOOLS, eventually, keys_folder, listening, read_folder


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a moto server."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [TOOLS / "python", TOOLS / "moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
    try:
        eventually("moto listens", lambda: listening(port), seconds=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(10)


@pytest.fixture
def s3(moto: str, tmp_path: Path) -> Iterator[S3]:
    keys = keys_folder(tmp_path / "keys")
    with connect(Connection(endpoint=moto, path_style=True, credentials_dir=keys), patience=5) as opened:
        yield opened


@pytest.fixture
def bucket(s3: S3, tmp_path: Path) -> str:
    name = f"bucket-{abs(hash(tmp_path)):x}"
    s3.client.create_bucket(Bucket=name)
    return f"s3://{name}"


def test_listings_and_deletions_of_more_than_a_page(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.client, "list_objects_v2", partial(s3.client.list_objects_v2, MaxKeys=3))
    monkeypatch.setattr("trimtab_store.connection._BATCH", 4)
    uris = [f"{bucket}/many/{number:02}" for number in range(10)]
    for uri in uris:
        s3.put_object(uri, b"")
    assert [info.uri for info in s3.list(f"{bucket}/many")] == uris
    assert s3.delete_prefix(f"{bucket}/many") == 10
    assert list(s3.list(bucket)) == []


def test_parts_are_as_large_as_s3_wants_them(s3: S3, bucket: str, tmp_path: Path) -> None:
    files = {"model.safetensors": os.urandom((33 << 20) + 1), "config.json": b"{}"}
    (tmp_path / "source").mkdir()
    for path, content in files.items():
        (tmp_path / "source" / path).write_bytes(content)
    publish(s3, tmp_path / "source", f"{bucket}/art", {})
    fetch(s3, f"{bucket}/art", tmp_path / "into")
    assert read_folder(tmp_path / "into") == files
    assert "-" in s3.stat(f"{bucket}/art/model.safetensors").etag, "three parts make a multi-part object"


def test_another_version_is_refused_by_the_server_too(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/x", b"one")
    etag = s3.stat(f"{bucket}/x").etag
    s3.put_object(f"{bucket}/x", b"two")
    with pytest.raises(ObjectChanged, match=f"{bucket}/x"):
        s3.read_into(f"{bucket}/x", 0, bytearray(3), etag=etag)


@pytest.fixture
def service_account(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What a cluster with IRSA puts into a pod's environment; called with the STS endpoint."""

    def set_up(endpoint: str) -> None:
        (tmp_path / "token").write_text("a.b.c")
        for name, value in {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/trimtab",
            "AWS_ENDPOINT_URL_STS": endpoint,
            "AWS_REGION": "eu-central-1",
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
        }.items():
            monkeypatch.setenv(name, value)

    return set_up


def test_the_role_of_a_service_account(moto: str, bucket: str, service_account: Callable[[str], None]) -> None:
    service_account(moto)
    with connect(Connection(endpoint=moto, path_style=True)) as opened:
        opened.put_object(f"{bucket}/x", b"by role")
        assert opened.get_object(f"{bucket}/x") == b"by role"


def test_a_role_that_cannot_be_had(moto: str, service_account: Callable[[str], None]) -> None:
    service_account(f"http://127.0.0.1:{free_port()}")
    with (
        connect(Connection(endpoint=moto, path_style=True), patience=1) as opened,
        pytest.raises((StorageUnreachable, CredentialsWrong)),
    ):
        opened.get_object("s3://bucket/x")
