"""The cache, as several processes use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trimtab_api.contract import Connection
from trimtab_store import S3, Cache, publish
from trimtab_store.errors import DigestMismatch, DiskFull, StorageUnreachable, UnsafeFormat

from .conftest import Fault, Proxy, eventually, read_folder

Folder = Callable[..., Path]
MIB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entries(root: Path) -> list[str]:
    """Everything in the cache but the locks."""
    return sorted(path.name for path in root.iterdir() if path.name != "locks")


def artifact(s3: S3, folder: Folder, uri: str, size: int = 10) -> str:
    """Publish an artifact of its own content; returns its digest."""
    files = {"model.safetensors": os.urandom(size), "config.json": b"{}"}
    return publish(s3, folder(files, uri.replace("/", "_")), uri, {}).digest


def test_an_artifact_is_fetched_once_and_found_by_digest(
    s3: S3, through: S3, proxy: Proxy, bucket: str, folder: Folder, cache: Cache, tmp_path: Path
) -> None:
    digest = artifact(s3, folder, f"{bucket}/art")
    with cache.get(through, f"{bucket}/art") as first:
        assert first.digest == digest
        assert first.path == tmp_path / "cache" / digest.replace(":", "-")
        assert set(read_folder(first.path)) == {"model.safetensors", "config.json"}
    asked = len(proxy.requests)
    with cache.get(through, f"{bucket}/art", expected_digest=digest) as again:
        assert again.path == first.path
    assert len(proxy.requests) == asked, "an artifact that is known by digest needs no request"
    assert (first.path.stat().st_mode & 0o777, entries(tmp_path / "cache")) == (0o755, [first.path.name])


def test_the_same_content_under_another_uri_is_the_same_entry(
    s3: S3, bucket: str, folder: Folder, cache: Cache
) -> None:
    source = folder({"a": b"1"})
    publish(s3, source, f"{bucket}/one", {})
    publish(s3, source, f"{bucket}/two", {})
    with cache.get(s3, f"{bucket}/one") as one, cache.get(s3, f"{bucket}/two") as two:
        assert one.path == two.path


def test_a_failed_fetch_leaves_nothing_and_may_be_repeated(
    s3: S3, bucket: str, folder: Folder, cache: Cache, tmp_path: Path
) -> None:
    artifact(s3, folder, f"{bucket}/art")
    content = s3.get_object(f"{bucket}/art/config.json")
    s3.put_object(f"{bucket}/art/config.json", b"[]")
    with pytest.raises(DigestMismatch, match=r"art/config\.json: its sha256"):
        cache.get(s3, f"{bucket}/art")
    with pytest.raises(DigestMismatch, match="wanted is sha256:0000"):
        cache.get(s3, f"{bucket}/art", expected_digest=f"sha256:{'0' * 64}")
    assert entries(tmp_path / "cache") == []
    s3.put_object(f"{bucket}/art/config.json", content)
    cache.get(s3, f"{bucket}/art").release()


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "sub/x.pkl", "x.pth", "x.ckpt", "x.pickle"])
def test_pickles_are_refused(s3: S3, bucket: str, folder: Folder, cache: Cache, tmp_path: Path, name: str) -> None:
    publish(s3, folder({name: b"x", "config.json": b"{}"}), f"{bucket}/art", {})
    with pytest.raises(UnsafeFormat, match=f"{bucket}/art: .*{name}"):
        cache.get(s3, f"{bucket}/art", safetensors_only=True)
    assert entries(tmp_path / "cache") == []


def test_pickles_beside_safetensors_are_left_out(s3: S3, bucket: str, folder: Folder, cache: Cache) -> None:
    publish(s3, folder({"training_args.bin": b"x", "model.safetensors": b"y"}), f"{bucket}/art", {})
    with cache.get(s3, f"{bucket}/art", safetensors_only=True) as safe, cache.get(s3, f"{bucket}/art") as whole:
        assert read_folder(safe.path) == {"model.safetensors": b"y"}
        assert set(read_folder(whole.path)) == {"training_args.bin", "model.safetensors"}
        assert safe.digest == whole.digest
    with cache.get(s3, f"{bucket}/art", safetensors_only=True, expected_digest=safe.digest) as again:
        assert again.path == safe.path


def test_foreign_folders_are_cached_by_what_is_listed(s3: S3, bucket: str, cache: Cache) -> None:
    s3.put_object(f"{bucket}/theirs/config.json", b"{}")
    with cache.get(s3, f"{bucket}/theirs", foreign=True) as first:
        s3.put_object(f"{bucket}/theirs/config.json", b"[]")
        with cache.get(s3, f"{bucket}/theirs", foreign=True) as second:
            assert (read_folder(first.path), read_folder(second.path)) == (
                {"config.json": b"{}"},
                {"config.json": b"[]"},
            )


# ------------------------------------------------------------------------------------------------ eviction


def test_the_longest_unused_goes_first(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=3 * MIB)
    uris = [f"{bucket}/{letter}" for letter in "abc"]
    digests = [artifact(s3, folder, uri, MIB - 4096) for uri in uris]
    for uri in uris:
        cache.get(s3, uri).release()
    cache.get(s3, uris[0], expected_digest=digests[0]).release()
    artifact(s3, folder, f"{bucket}/d", MIB - 4096)
    with cache.get(s3, f"{bucket}/d") as new:
        kept = {new.path.name, *(digest.replace(":", "-") for digest in (digests[0], digests[2]))}
        assert set(entries(tmp_path / "cache")) == kept


def test_what_is_in_use_stays_and_the_lack_is_said(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=2 * MIB)
    for letter in "abc":
        artifact(s3, folder, f"{bucket}/{letter}", MIB - 4096)
    one, other = cache.get(s3, f"{bucket}/a"), cache.get(s3, f"{bucket}/b")
    with pytest.raises(DiskFull, match=r"limit of 2\.0 MiB.*in use") as caught:
        cache.get(s3, f"{bucket}/c")
    assert 0 < caught.value.missing_bytes < MIB
    assert set(entries(tmp_path / "cache")) == {one.path.name, other.path.name}
    other.release()
    other.release()
    with cache.get(s3, f"{bucket}/c") as new:
        assert set(entries(tmp_path / "cache")) == {one.path.name, new.path.name}
    one.release()


def test_what_can_never_fit_evicts_nothing(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=2 * MIB)
    artifact(s3, folder, f"{bucket}/a", MIB)
    artifact(s3, folder, f"{bucket}/b", 3 * MIB)
    cache.get(s3, f"{bucket}/a").release()
    with pytest.raises(DiskFull):
        cache.get(s3, f"{bucket}/b")
    assert len(entries(tmp_path / "cache")) == 1


def test_a_full_disk_evicts_even_without_a_limit(s3: S3, bucket: str, folder: Folder, small_disk: Path) -> None:
    cache = Cache(small_disk / "cache")
    for letter in "ab":
        artifact(s3, folder, f"{bucket}/{letter}", 20 * MIB)
    cache.get(s3, f"{bucket}/a").release()
    with cache.get(s3, f"{bucket}/b") as kept:
        assert entries(small_disk / "cache") == [kept.path.name]
        with pytest.raises(DiskFull, match=r"the disk: .* missing"):
            cache.get(s3, f"{bucket}/a")


# ------------------------------------------------------------------------------------------------ other processes

PROGRAM = """
import sys
from pathlib import Path
from trimtab_api.contract import Connection
from trimtab_store import Cache, connect
s3 = connect(Connection.model_validate_json(sys.argv[1]), patience=30)
entry = Cache(Path(sys.argv[2])).get(s3, sys.argv[3])
print(entry.path.name, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(connection: Connection, proxy: Proxy, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that gets an artifact through the proxy, prints its folder's name and keeps it until told."""
    started: list[subprocess.Popen[str]] = []
    there = connection.model_copy(update={"endpoint": f"http://127.0.0.1:{proxy.port}"}).model_dump_json()

    def start(uri: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, there, str(tmp_path / "cache"), uri]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


Start = Callable[[str], "subprocess.Popen[str]"]


def test_processes_that_want_the_same_fetch_it_once(
    s3: S3, proxy: Proxy, bucket: str, folder: Folder, other: Start
) -> None:
    digest = artifact(s3, folder, f"{bucket}/art", MIB)
    processes = [other(f"{bucket}/art") for _ in range(3)]
    names = {process.stdout.readline().strip() for process in processes if process.stdout}
    assert names == {digest.replace(":", "-")}
    assert sum("model.safetensors" in path for _, path in proxy.requests) == 1


def test_another_process_keeps_its_entry_until_it_ends(
    s3: S3, bucket: str, folder: Folder, other: Start, tmp_path: Path
) -> None:
    digest = artifact(s3, folder, f"{bucket}/a", MIB)
    artifact(s3, folder, f"{bucket}/b", MIB)
    user = other(f"{bucket}/a")
    assert user.stdout is not None
    assert user.stdout.readline()
    cache = Cache(tmp_path / "cache", limit_bytes=MIB + 4096)
    with pytest.raises(DiskFull):
        cache.get(s3, f"{bucket}/b")
    user.send_signal(signal.SIGKILL)
    user.wait(10)
    with cache.get(s3, f"{bucket}/b") as new:
        assert entries(tmp_path / "cache") == [new.path.name]
        assert new.digest != digest


def test_a_process_killed_while_it_fetches_leaves_no_trace_for_long(
    s3: S3, proxy: Proxy, bucket: str, folder: Folder, other: Start, tmp_path: Path
) -> None:
    artifact(s3, folder, f"{bucket}/art", MIB)
    artifact(s3, folder, f"{bucket}/next", MIB)
    stall = proxy.add(Fault("stall", contains="art/model", value=1000, times=9))
    killed = other(f"{bucket}/art")
    eventually("it is in the midst of the fetch", lambda: stall.seen == 1 and len(entries(tmp_path / "cache")) == 1)
    cache = Cache(tmp_path / "cache", limit_bytes=MIB + 4096)
    with pytest.raises(StorageUnreachable, match="has not fetched it in time"):
        cache.get(s3, f"{bucket}/art", wait=0.3)
    with pytest.raises(DiskFull):
        cache.get(s3, f"{bucket}/next")
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert [name for name in entries(tmp_path / "cache") if "partial" in name]
    with cache.get(s3, f"{bucket}/next") as new:
        assert entries(tmp_path / "cache") == [new.path.name]
    with cache.get(s3, f"{bucket}/art") as again:
        assert entries(tmp_path / "cache") == [again.path.name]


def test_many_threads_on_a_small_cache_never_see_a_half_made_entry(
    s3: S3, bucket: str, folder: Folder, tmp_path: Path
) -> None:
    """Getting, releasing and evicting at once: each entry that is given out is whole while it is held."""
    uris = [f"{bucket}/{letter}" for letter in "abcd"]
    for uri in uris:
        artifact(s3, folder, uri, 100_000)
    cache = Cache(tmp_path / "cache", limit_bytes=250_000)
    failures: list[BaseException] = []
    until = time.monotonic() + 3

    def use(number: int) -> None:
        turn = number
        while time.monotonic() < until and not failures:
            turn += 1
            try:
                with cache.get(s3, uris[turn % len(uris)]) as entry:
                    assert len(read_folder(entry.path)["model.safetensors"]) == 100_000
            except DiskFull:
                continue
            except BaseException as error:  # noqa: BLE001 - told by the assertion below
                failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(entries(tmp_path / "cache")) <= 2


def test_a_cache_below_a_missing_folder_is_made(tmp_path: Path) -> None:
    Cache(tmp_path / "a/b/cache")
    assert (tmp_path / "a/b/cache/locks").is_dir()
