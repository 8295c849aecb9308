"""Manifests: what makes a prefix exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab_api.contract import ManifestFile
from trimtab_store import S3, find_checkpoints, identify, publish, read_manifest, retract, write_manifest
from trimtab_store.artifact import check_paths
from trimtab_store.errors import BucketMissing, DigestMismatch, NotAnArtifact, ObjectMissing, UnsafePath

Folder = Callable[[dict[str, bytes]], Path]
DIGEST = "0" * 64


def test_a_manifest_is_read_as_it_was_written(s3: S3, bucket: str, folder: Folder) -> None:
    made_by = {"spec": {"learningRate": 1e-4, "nothing": None}, "note": "ü"}
    written = publish(s3, folder({"b": b"two", "a/c": b""}), f"{bucket}/art", made_by)
    read = read_manifest(s3, f"{bucket}/art/")
    assert read == written
    assert read.digest == written.digest
    assert read.made_by == made_by
    assert [(file.path, file.size) for file in read.files] == [("a/c", 0), ("b", 3)]


def test_what_has_no_manifest_is_no_artifact(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/folder/model.safetensors", b"x")
    with pytest.raises(NotAnArtifact, match=f"{bucket}/folder: there is no manifest.json"):
        read_manifest(s3, f"{bucket}/folder")
    with pytest.raises(BucketMissing):
        read_manifest(s3, "s3://no-such-bucket/folder")


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b'{"files": 3}', "files: "),
        (b'{"format": 2, "files": []}', "format: "),
        (b'{"files": [{"path": "a", "size": -1, "sha256": "0"}]}', "size"),
    ],
)
def test_what_does_not_parse_is_no_artifact(s3: S3, bucket: str, text: bytes, about: str) -> None:
    s3.put_object(f"{bucket}/art/manifest.json", text)
    with pytest.raises(NotAnArtifact, match=about):
        read_manifest(s3, f"{bucket}/art")
    with pytest.raises(NotAnArtifact):
        identify(s3, f"{bucket}/art")


@pytest.mark.parametrize(
    ("paths", "about"),
    [
        (["/etc/passwd"], "leaves the folder"),
        (["../x"], "leaves the folder"),
        (["a/../../x"], "leaves the folder"),
        (["a//b"], "cannot be a file's"),
        (["a/"], "cannot be a file's"),
        (["./a"], "cannot be a file's"),
        (["a\0b"], "cannot be a file's"),
        (["x" * 256], "too long"),
        (["manifest.json"], "is the manifest's own"),
        (["a", "a"], "is there twice"),
        (["a", "a/b"], "is a file and a folder"),
        (["a/b/c", "a/b"], "is a file and a folder"),
    ],
)
def test_unsafe_paths(paths: list[str], about: str) -> None:
    with pytest.raises(UnsafePath, match=f"s3://bucket/art: .*{about}"):
        check_paths("s3://bucket/art", paths)


def test_ordinary_paths_are_safe() -> None:
    check_paths("s3://bucket/art", ["a", "b/a", "b/manifest.json", "..a", "ü +%", "x" * 255])


def test_an_unsafe_manifest_is_neither_read_nor_written(s3: S3, bucket: str) -> None:
    files = [{"path": "../../etc/cron.d/x", "size": 0, "sha256": DIGEST}]
    s3.put_object(f"{bucket}/art/manifest.json", json.dumps({"files": files}).encode())
    with pytest.raises(UnsafePath):
        read_manifest(s3, f"{bucket}/art")
    with pytest.raises(UnsafePath):
        write_manifest(s3, f"{bucket}/other", [ManifestFile(path="../x", size=0, sha256=DIGEST)], {})


def test_a_manifest_is_not_written_for_what_did_not_arrive(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/art/there", b"123")
    with pytest.raises(ObjectMissing, match=f"{bucket}/art/lost: the upload did not arrive"):
        write_manifest(s3, f"{bucket}/art", [ManifestFile(path="lost", size=1, sha256=DIGEST)], {})
    with pytest.raises(DigestMismatch, match=f"{bucket}/art/there: 3 bytes arrived of 4"):
        write_manifest(s3, f"{bucket}/art", [ManifestFile(path="there", size=4, sha256=DIGEST)], {})
    assert not s3.exists(f"{bucket}/art/manifest.json")


def test_a_retracted_artifact_does_not_exist(s3: S3, bucket: str, folder: Folder) -> None:
    publish(s3, folder({"a": b"1"}), f"{bucket}/art", {})
    retract(s3, f"{bucket}/art")
    retract(s3, f"{bucket}/art")
    with pytest.raises(NotAnArtifact):
        read_manifest(s3, f"{bucket}/art")


def test_checkpoints_are_the_complete_ones_newest_first(s3: S3, bucket: str, folder: Folder) -> None:
    source = folder({"a": b"1"})
    digests = {
        step: publish(s3, source, f"{bucket}/run/{step:09d}", {"step": step}).digest for step in (100, 9, 1000, 50)
    }
    retract(s3, f"{bucket}/run/000000100")
    s3.put_object(f"{bucket}/run/000000050/manifest.json", b"{")
    s3.put_object(f"{bucket}/run/latest/manifest.json", b"{}")
    found = find_checkpoints(s3, f"{bucket}/run")
    assert [(each.step, each.digest) for each in found] == [(1000, digests[1000]), (9, digests[9])]
    assert found[0].uri == f"{bucket}/run/000001000"
    assert find_checkpoints(s3, f"{bucket}/nothing") == []


def test_identity_of_an_artifact_is_its_manifest(s3: S3, bucket: str, folder: Folder) -> None:
    manifest = publish(s3, folder({"a": b"12", "b": b"3"}), f"{bucket}/art", {})
    identity = identify(s3, f"{bucket}/art")
    assert (identity.digest, identity.size, identity.files) == (manifest.digest, 3, ("a", "b"))
    assert identity.manifest == manifest


def test_identity_of_anything_else_follows_its_content(s3: S3, bucket: str) -> None:
    s3.put_object(f"{bucket}/data/rows.jsonl", b"one")
    whole, single = identify(s3, f"{bucket}/data"), identify(s3, f"{bucket}/data/rows.jsonl")
    assert whole.files == single.files == ("rows.jsonl",)
    assert whole.manifest is None
    assert single.single
    assert identify(s3, f"{bucket}/data/") == whole
    s3.put_object(f"{bucket}/data/rows.jsonl", b"two")
    assert identify(s3, f"{bucket}/data").digest != whole.digest
    assert identify(s3, f"{bucket}/data/rows.jsonl").digest != single.digest
    for nothing in (f"{bucket}/none", f"{bucket}/none/"):
        with pytest.raises(ObjectMissing, match=nothing):
            identify(s3, nothing)
