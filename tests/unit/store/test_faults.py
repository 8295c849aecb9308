"""What a network and a server can do to a transfer, through a proxy that does it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab_api.contract import Connection
from trimtab_store import S3, connect, fetch, publish, read_manifest
from trimtab_store.errors import (
    AccessDenied,
    CredentialsWrong,
    DigestMismatch,
    ObjectChanged,
    ShortRead,
    StorageError,
    StorageUnreachable,
    UploadLost,
)

from .conftest import Fault, Proxy, Server, eventually, keys_folder, read_folder

Folder = Callable[[dict[str, bytes]], Path]
PART = 1 << 16
FILES = {"large": os.urandom(10 * PART + 5), "small": b"s" * 100}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab_store.upload._PART", PART)
    monkeypatch.setattr("trimtab_store.download._PART", PART)
    monkeypatch.setattr("trimtab_store.connection._READ_TIMEOUT", 1)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", value=503, code="SlowDown", times=3),
        Fault("status", value=500, times=2),
        Fault("status", value=429, code="TooManyRequests"),
        Fault("status", value=400, code="RequestTimeout"),
        Fault("reset", times=3),
        Fault("short", contains="large", value=1000, times=3),
        Fault("short", contains="manifest.json", value=10),
        Fault("stall", contains="large", value=0),
        Fault("stall", contains="large", value=1000),
    ],
    ids=lambda fault: f"{fault.kind} {fault.value or ''} {fault.contains}",
)
def test_a_passing_fault_does_not_show_in_what_comes_down(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder, tmp_path: Path, fault: Fault
) -> None:
    publish(s3, folder(FILES), f"{bucket}/art", {})
    proxy.add(fault)
    fetch(through, f"{bucket}/art", tmp_path / "into")
    assert fault.seen == fault.times
    assert read_folder(tmp_path / "into") == FILES


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", value=503, code="SlowDown", times=3),
        Fault("status", value=404, code="NoSuchKey"),
        Fault("reset", times=3),
        Fault("short", value=0, times=2),
        Fault("short", value=900),
        Fault("stall", value=0),
        Fault("stall", value=900),
    ],
    ids=lambda fault: f"{fault.kind} {fault.value}",
)
def test_a_passing_fault_does_not_show_in_many_small_files(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder, tmp_path: Path, fault: Fault
) -> None:
    """They come in lots; the first that fails, and all after it, are brought one by one."""
    files = {f"{number % 3}/{number:03}": os.urandom(1000 + number) for number in range(100)}
    publish(s3, folder(files), f"{bucket}/art", {})
    fault.contains = "041"
    proxy.add(fault)
    fetch(through, f"{bucket}/art", tmp_path / "into")
    assert fault.seen == fault.times
    assert read_folder(tmp_path / "into") == files
    asked = [path for method, path in proxy.requests if method == "GET" and "art/" in path]
    assert len(asked) < 100 + 40, "what had come was not asked for again"


def test_small_files_are_asked_for_before_the_earlier_ones_have_come(
    s3: S3,
    proxy: Proxy,
    connection: Connection,
    bucket: str,
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimtab_store.connection._READ_TIMEOUT", 60)
    files = {f"{number}": b"x" * 100 for number in range(6)}
    publish(s3, folder(files), f"{bucket}/art", {})
    for number in range(6):
        proxy.add(Fault("slow", contains=f"art/{number}", value=1))
    began = time.monotonic()
    with connect(connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"})) as through:
        fetch(through, f"{bucket}/art", tmp_path / "into")
    assert time.monotonic() - began < 4, "one after the other they take six seconds"
    assert read_folder(tmp_path / "into") == files


@pytest.mark.parametrize("kind", ["status", "reset"])
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_passing_fault_does_not_show_in_what_goes_up(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder, tmp_path: Path, kind: str, method: str
) -> None:
    fault = proxy.add(Fault(kind, method=method, value=503, code="SlowDown", times=2))
    manifest = publish(through, folder(FILES), f"{bucket}/art", {})
    assert fault.seen == 2
    fetch(s3, f"{bucket}/art", tmp_path / "into", expected_digest=manifest.digest)
    assert read_folder(tmp_path / "into") == FILES


def lasting(kind: str, value: int = 0, code: str = "", contains: str = "large") -> Fault:
    return Fault(kind, contains=contains, value=value, code=code, times=99)


@pytest.mark.parametrize(
    ("fault", "error", "about"),
    [
        (lasting("status", 403, "AccessDenied"), AccessDenied, "art/large: .*may not"),
        (lasting("status", 403), AccessDenied, "art/large: .*may not"),
        (lasting("status", 400, "ExpiredToken"), CredentialsWrong, "art/large: the session token has expired"),
        (lasting("status", 501, "InternalError"), StorageUnreachable, "art/large: .*501"),
        (lasting("status", 409, "Odd"), StorageError, "art/large: .*409 Odd"),
        (lasting("short", 7), ShortRead, "art/large: .*sent 7 of"),
        (lasting("reset"), StorageUnreachable, "art/large: .*did not answer"),
        (lasting("flip", 7), DigestMismatch, "art/large: its sha256 is"),
        (lasting("flip", 7, contains="small"), DigestMismatch, "art/small: its sha256 is"),
    ],
    ids=lambda value: f"{value.kind} {value.value} {value.code}" if isinstance(value, Fault) else "",
)
def test_a_lasting_fault_names_the_object_and_leaves_nothing(
    s3: S3,
    proxy: Proxy,
    connection: Connection,
    bucket: str,
    folder: Folder,
    tmp_path: Path,
    fault: Fault,
    error: type[StorageError],
    about: str,
) -> None:
    publish(s3, folder(FILES), f"{bucket}/art", {})
    proxy.add(fault)
    spoilt = connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"})
    with connect(spoilt, patience=1) as through, pytest.raises(error, match=about):
        fetch(through, f"{bucket}/art", tmp_path / "into")
    assert [path.name for path in tmp_path.iterdir() if "into" in path.name] == []


def test_a_lasting_fault_of_an_upload_leaves_no_artifact_and_no_parts(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder
) -> None:
    proxy.add(Fault("status", method="PUT", contains="partNumber=5", value=403, code="AccessDenied", times=99))
    with pytest.raises(AccessDenied, match=f"{bucket}/art/large: the keys may not put this"):
        publish(through, folder(FILES), f"{bucket}/art", {})
    assert not s3.exists(f"{bucket}/art/manifest.json")
    assert any(method == "DELETE" and "uploadId" in path for method, path in proxy.requests)


def test_a_stream_goes_on_where_it_broke(s3: S3, through: S3, proxy: Proxy, bucket: str) -> None:
    rows = [f"row {number} {'x' * 50}" for number in range(20_000)]
    s3.put_object(f"{bucket}/rows.jsonl", "\n".join(rows).encode())
    fault = proxy.add(Fault("short", value=300_000, times=4))
    assert list(through.open_lines(f"{bucket}/rows.jsonl")) == rows
    assert fault.seen == 4


def test_a_stream_of_an_object_that_is_replaced_is_an_error(s3: S3, through: S3, proxy: Proxy, bucket: str) -> None:
    s3.put_object(f"{bucket}/rows.jsonl", b"a" * 1_000_000)
    proxy.add(Fault("short", value=500_000))
    stream = through.stream(f"{bucket}/rows.jsonl")
    assert set(next(stream)) == {ord("a")}
    s3.put_object(f"{bucket}/rows.jsonl", b"b" * 1_000_000)
    with pytest.raises(ObjectChanged, match="replaced while it was read"):
        list(stream)


def test_an_outage_is_survived(
    s3: S3, proxy: Proxy, connection: Connection, bucket: str, folder: Folder, tmp_path: Path
) -> None:
    publish(s3, folder(FILES), f"{bucket}/art", {})
    proxy.down()
    comeback = threading.Timer(6, proxy.up)
    comeback.start()
    began = time.monotonic()
    there = connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"})
    with connect(there, patience=30) as through:
        fetch(through, f"{bucket}/art", tmp_path / "into")
    comeback.join()
    assert read_folder(tmp_path / "into") == FILES
    assert 5 < time.monotonic() - began < 25


def test_a_server_that_forgets_an_upload_gets_it_again(folder: Folder, tmp_path: Path) -> None:
    """A server that keeps the parts in memory loses them when it is killed: here after the third part."""
    server = Server(tmp_path / "served")
    (server.root / "bucket").mkdir(parents=True)
    server.start()
    told = threading.Event()

    def kill_once(done: int, _: int) -> None:
        if done >= 3 * PART and not told.is_set():
            told.set()
            server.stop()
            server.start()

    connection = Connection(endpoint=server.endpoint, path_style=True, credentials_dir=keys_folder(tmp_path / "keys"))
    try:
        with connect(connection, patience=20) as s3:
            manifest = publish(s3, folder(FILES), "s3://bucket/art", {}, progress=kill_once)
            assert told.is_set()
            fetch(s3, "s3://bucket/art", tmp_path / "into", expected_digest=manifest.digest)
            assert read_manifest(s3, "s3://bucket/art") == manifest
        assert read_folder(tmp_path / "into") == FILES
    finally:
        server.stop()


@pytest.mark.parametrize("code", ["NoSuchUpload", "InvalidPart"])
def test_an_upload_that_cannot_be_completed_is_begun_again_but_not_for_ever(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder, tmp_path: Path, code: str
) -> None:
    source = folder(FILES)
    fault = proxy.add(Fault("status", method="POST", contains="uploadId=", value=400, code=code, times=2))
    manifest = publish(through, source, f"{bucket}/art", {})
    assert fault.seen == 2
    fetch(s3, f"{bucket}/art", tmp_path / "into", expected_digest=manifest.digest)
    assert read_folder(tmp_path / "into") == FILES
    fault.times = 99
    with pytest.raises(UploadLost, match=f"{bucket}/art/large: the storage has forgotten"):
        publish(through, source, f"{bucket}/art", {})
    assert fault.seen == 5, "three rounds"


def test_a_server_may_take_its_time_to_put_an_object_together(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder
) -> None:
    slow = proxy.add(Fault("slow", method="POST", contains="uploadId=", value=3))
    publish(through, folder(FILES), f"{bucket}/art", {})
    assert slow.seen == 1
    assert sum(method == "POST" and "uploadId=" in path for method, path in proxy.requests) == 1, "asked once"


def test_giving_up_interrupts_the_pauses_of_other_threads(
    s3: S3, proxy: Proxy, connection: Connection, bucket: str, folder: Folder, tmp_path: Path
) -> None:
    """One file fails for good while another is being tried again for a long time: nobody waits for the latter."""
    publish(s3, folder({"a": b"x" * PART, "b": b"y" * PART}), f"{bucket}/art", {})
    proxy.add(Fault("reset", contains="art/a", times=999))
    proxy.add(Fault("status", contains="art/b", value=403, code="AccessDenied", times=99))
    there = connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"})
    began = time.monotonic()
    with connect(there, patience=60) as through, pytest.raises(AccessDenied):
        fetch(through, f"{bucket}/art", tmp_path / "into")
    assert time.monotonic() - began < 10
    eventually("no thread is left", lambda: not [t for t in threading.enumerate() if "trimtab-store" in t.name])
