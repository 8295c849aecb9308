"""Folders up and down against a real server, with small parts so that every path is walked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab_api.contract import Connection
from trimtab_store import S3, fetch, publish, read_manifest, upload_files, write_manifest
from trimtab_store.errors import (
    DigestMismatch,
    DiskFull,
    LocalFileFailed,
    NotAnArtifact,
    ObjectMissing,
    UnsafePath,
)

from .conftest import read_folder

Folder = Callable[[dict[str, bytes]], Path]
PART = 1 << 16


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab_store.upload._PART", PART)
    monkeypatch.setattr("trimtab_store.download._PART", PART)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 20 * PART + 17])
def test_every_size_goes_up_and_comes_down(s3: S3, bucket: str, folder: Folder, tmp_path: Path, size: int) -> None:
    files = {"model.safetensors": os.urandom(size), "sub/other": b"x"}
    manifest = publish(s3, folder(files), f"{bucket}/art", {"step": 3})
    assert fetch(s3, f"{bucket}/art", tmp_path / "into", expected_digest=manifest.digest) == manifest.digest
    assert read_folder(tmp_path / "into") == files
    assert (tmp_path / "into/manifest.json").read_bytes() == manifest.encoded()


def test_many_files(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    files = {f"{number % 7}/{number}": os.urandom(number * 97) for number in range(150)}
    publish(s3, folder(files), f"{bucket}/art", {})
    before = open_files()
    fetch(s3, f"{bucket}/art", tmp_path / "into")
    assert read_folder(tmp_path / "into") == files
    assert open_files() <= before + 8


def test_what_was_fetched_is_readable_by_everyone(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    publish(s3, folder({"sub/a": b"1"}), f"{bucket}/art", {})
    before = os.umask(0o077)
    try:
        fetch(s3, f"{bucket}/art", tmp_path / "into")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "into").rglob("*")}
    assert modes == {"sub": 0o755, "a": 0o644, "manifest.json": 0o644}
    assert (tmp_path / "into").stat().st_mode & 0o777 == 0o755


def test_ranks_upload_their_own_files_and_one_writes_the_manifest(s3: S3, bucket: str, folder: Folder) -> None:
    source = folder({"weights": b"w" * 100, "rng_0.pth": b"0", "rng_1.pth": b"1"})
    first = upload_files(s3, source, f"{bucket}/c", files=["weights", "rng_0.pth"])
    second = upload_files(s3, source, f"{bucket}/c", files=["rng_1.pth"])
    with pytest.raises(NotAnArtifact):
        read_manifest(s3, f"{bucket}/c")
    manifest = write_manifest(s3, f"{bucket}/c", [*first, *second], {})
    assert [file.path for file in manifest.files] == ["rng_0.pth", "rng_1.pth", "weights"]


def test_publishing_again_replaces_and_never_shows_a_mixture(
    s3: S3, bucket: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder({"a": b"1"})
    publish(s3, source, f"{bucket}/art", {})
    (source / "a").write_bytes(b"2")

    def torn(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("trimtab_store.upload.upload_files", torn)
        with pytest.raises(KeyboardInterrupt):
            publish(s3, source, f"{bucket}/art", {})
    with pytest.raises(NotAnArtifact):
        read_manifest(s3, f"{bucket}/art")
    publish(s3, source, f"{bucket}/art", {})
    assert s3.get_object(f"{bucket}/art/a") == b"2"


def test_a_fetched_folder_can_be_published_again(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    manifest = publish(s3, folder({"a": b"1"}), f"{bucket}/art", {})
    fetch(s3, f"{bucket}/art", tmp_path / "into")
    assert publish(s3, tmp_path / "into", f"{bucket}/copy", {}).digest == manifest.digest


def test_only_what_is_wanted(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    publish(s3, folder({"config.json": b"{}", "sub/x.json": b"[]", "model.bin": b"x"}), f"{bucket}/art", {})
    fetch(s3, f"{bucket}/art", tmp_path / "into", only=["*.json"])
    assert set(read_folder(tmp_path / "into")) == {"config.json", "sub/x.json"}
    with pytest.raises(ObjectMissing, match=r"none of its 3 files matches \*\.txt"):
        fetch(s3, f"{bucket}/art", tmp_path / "other", only=["*.txt"])


def test_foreign_folders_and_objects(s3: S3, bucket: str, tmp_path: Path) -> None:
    s3.put_object(f"{bucket}/theirs/config.json", b"{}")
    s3.put_object(f"{bucket}/theirs/sub/model", b"m" * (3 * PART))
    with pytest.raises(NotAnArtifact):
        fetch(s3, f"{bucket}/theirs", tmp_path / "into")
    fetch(s3, f"{bucket}/theirs", tmp_path / "into", foreign=True)
    assert read_folder(tmp_path / "into") == {"config.json": b"{}", "sub/model": b"m" * (3 * PART)}
    assert not (tmp_path / "into/manifest.json").exists()
    digest = fetch(s3, f"{bucket}/theirs/config.json", tmp_path / "single", foreign=True)
    assert read_folder(tmp_path / "single") == {"config.json": b"{}"}
    s3.put_object(f"{bucket}/theirs/config.json", b"[]")
    with pytest.raises(DigestMismatch, match=digest):
        fetch(s3, f"{bucket}/theirs/config.json", tmp_path / "again", foreign=True, expected_digest=digest)


def test_progress_ends_at_the_whole(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    up: list[tuple[int, int]] = []
    down: list[tuple[int, int]] = []
    publish(s3, folder({"a": b"x" * (5 * PART), "b": b"y"}), f"{bucket}/art", {}, progress=lambda *at: up.append(at))
    fetch(s3, f"{bucket}/art", tmp_path / "into", progress=lambda *at: down.append(at))
    for told in (up, down):
        assert told == sorted(told)
        assert told[-1] == (5 * PART + 1, 5 * PART + 1)


def test_an_exception_from_progress_cancels(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    def cancel(*_: int) -> None:
        raise Cancelled

    source = folder({"a": b"x" * (5 * PART)})
    with pytest.raises(Cancelled):
        publish(s3, source, f"{bucket}/art", {}, progress=cancel)
    assert not s3.exists(f"{bucket}/art/manifest.json")
    publish(s3, source, f"{bucket}/art", {})
    with pytest.raises(Cancelled):
        fetch(s3, f"{bucket}/art", tmp_path / "into", progress=cancel)
    assert not (tmp_path / "into").exists()
    assert leftovers(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trimtab-store")]


# ------------------------------------------------------------------------------------------------ what is refused


def spoil_content(s3: S3, art: str) -> None:
    s3.put_object(f"{art}/a", b"y" * (3 * PART))


def spoil_length(s3: S3, art: str) -> None:
    s3.put_object(f"{art}/a", b"x" * (2 * PART + 1))


def spoil_by_deleting(s3: S3, art: str) -> None:
    s3.delete_object(f"{art}/a")


@pytest.mark.parametrize(
    ("spoil", "error", "about"),
    [
        (spoil_content, DigestMismatch, "art/a: its sha256 is"),
        (spoil_length, DigestMismatch, "art/a: the object ends before byte"),
        (spoil_by_deleting, ObjectMissing, "art/a: the object does not exist"),
    ],
)
def test_what_is_not_as_the_manifest_says_leaves_nothing(
    s3: S3,
    bucket: str,
    folder: Folder,
    tmp_path: Path,
    spoil: Callable[[S3, str], None],
    error: type[Exception],
    about: str,
) -> None:
    publish(s3, folder({"a": b"x" * (3 * PART), "b": b"fine"}), f"{bucket}/art", {})
    spoil(s3, f"{bucket}/art")
    with pytest.raises(error, match=about):
        fetch(s3, f"{bucket}/art", tmp_path / "into")
    assert not (tmp_path / "into").exists()
    assert leftovers(tmp_path) == []


def test_another_digest_than_expected_is_refused_before_a_byte_is_read(
    s3: S3, bucket: str, folder: Folder, tmp_path: Path
) -> None:
    publish(s3, folder({"a": b"x"}), f"{bucket}/art", {})
    s3.delete_object(f"{bucket}/art/a")
    with pytest.raises(DigestMismatch, match=f"{bucket}/art: its digest is sha256:.*, wanted is sha256:1234"):
        fetch(s3, f"{bucket}/art", tmp_path / "into", expected_digest="sha256:1234")


def test_a_folder_with_something_in_it_is_left_alone(s3: S3, bucket: str, folder: Folder, tmp_path: Path) -> None:
    publish(s3, folder({"a": b"x"}), f"{bucket}/art", {})
    (tmp_path / "into").mkdir()
    fetch(s3, f"{bucket}/art", tmp_path / "into")
    (tmp_path / "into/own").touch()
    with pytest.raises(LocalFileFailed, match="there is something already"):
        fetch(s3, f"{bucket}/art", tmp_path / "into")
    assert (tmp_path / "into/own").exists()


@pytest.mark.parametrize("files", [["none"], ["../outside"], ["sub"]])
def test_files_that_cannot_be_uploaded(s3: S3, bucket: str, folder: Folder, files: list[str]) -> None:
    source = folder({"a": b"x", "sub/b": b"y"})
    with pytest.raises((LocalFileFailed, UnsafePath)):
        upload_files(s3, source, f"{bucket}/art", files=files)
    with pytest.raises(LocalFileFailed, match="no such folder"):
        upload_files(s3, source / "nowhere", f"{bucket}/art")


def test_a_file_that_changes_meanwhile_is_not_published(s3: S3, bucket: str, folder: Folder) -> None:
    source = folder({"a": b"x" * (50 * PART)})
    with pytest.raises(LocalFileFailed, match="changed while it was uploaded"):
        publish(s3, source, f"{bucket}/art", {}, progress=lambda *_: os.truncate(source / "a", PART))
    assert not s3.exists(f"{bucket}/art/manifest.json")


# ------------------------------------------------------------------------------------------------ disk and memory


def test_a_disk_that_is_too_small_is_said_first(s3: S3, bucket: str, folder: Folder, small_disk: Path) -> None:
    publish(s3, folder({"a": bytes(60 << 20)}), f"{bucket}/art", {})
    with pytest.raises(DiskFull, match=r"76\.0 MiB are needed and 48\.0 MiB are free: 28\.0 MiB are missing") as caught:
        fetch(s3, f"{bucket}/art", small_disk / "into")
    assert caught.value.missing_bytes == 28 << 20
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_meanwhile_is_said_and_left_clean(
    s3: S3, bucket: str, folder: Folder, small_disk: Path
) -> None:
    publish(s3, folder({str(number): bytes(1 << 16) for number in range(480)}), f"{bucket}/art", {})

    def another_writes(done: int, _: int) -> None:
        if not (small_disk / "other").exists():
            (small_disk / "other").write_bytes(bytes(30 << 20))

    with pytest.raises(DiskFull, match=r"into.*: the disk ran full"):
        fetch(s3, f"{bucket}/art", small_disk / "into", progress=another_writes)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_disk_that_fills_after_it_was_looked_at(
    s3: S3, bucket: str, folder: Folder, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(s3, folder({"a": bytes(30 << 20)}), f"{bucket}/art", {})
    monkeypatch.setattr("trimtab_store.download._check_free", lambda *_: None)
    (small_disk / "other").write_bytes(bytes(30 << 20))
    with pytest.raises(DiskFull, match="a: the disk ran full"):
        fetch(s3, f"{bucket}/art", small_disk / "into")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


PROGRAM = """
import resource, sys
from pathlib import Path
from trimtab_api.contract import Connection
from trimtab_store import connect, fetch, publish
s3 = connect(Connection.model_validate_json(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
publish(s3, Path(sys.argv[2]), sys.argv[3], {})
fetch(s3, sys.argv[3], Path(sys.argv[4]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(connection: Connection, bucket: str, folder: Folder, tmp_path: Path) -> None:
    source = folder({})
    source.mkdir()
    with (source / "large").open("wb") as file:
        file.truncate(320 << 20)
    arguments = [connection.model_dump_json(), str(source), f"{bucket}/art", str(tmp_path / "into")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=100, check=True
    )
    assert int(done.stdout) < 200 << 10  # KiB, beyond what the imports take
