"""Where models and adapters come from when it is not object storage, and what is said when they do not come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from trimtab_api.conditions import Reason
from trimtab_api.contract import Manifest, ModelInput, S3Place
from trimtab_api.v1alpha1.source import HubModel
from trimtab_server.agent.failure import Unservable
from trimtab_server.agent.inputs import Inputs
from trimtab_store import Cache

from .conftest import Storage, write_adapter, write_base


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(Cache(tmp_path / "cache"), tmp_path / "hub")


def at(path: Path) -> ModelInput:
    return ModelInput(field="model.from", reference="volume://claim", path=str(path))


def _pickled(folder: Path) -> None:
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _spoilt_manifest(folder: Path) -> None:
    write_base(folder)
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "reason", "says"),
    [
        (lambda folder: None, Reason.OBJECT_MISSING, "correct the path"),
        (lambda folder: folder.mkdir(), Reason.MODEL_INVALID, "safetensors"),
        (_pickled, Reason.UNSAFE_FORMAT, "pytorch_model.bin"),
        (_spoilt_manifest, Reason.NOT_AN_ARTIFACT, "publish the artifact again"),
    ],
    ids=["missing", "empty", "pickled", "spoilt manifest"],
)
async def test_folders_that_cannot_be_served(
    inputs: Inputs, tmp_path: Path, make: Callable[[Path], None], reason: Reason, says: str
) -> None:
    make(tmp_path / "model")
    with pytest.raises(Unservable, match=says) as caught:
        await inputs.fetch(at(tmp_path / "model"), "model")
    assert caught.value.reason is reason


async def test_a_folder_with_a_manifest_has_its_digest(inputs: Inputs, tmp_path: Path) -> None:
    manifest = Manifest(files=[], made_by={"base": {"uri": "s3://x", "digest": "sha256:" + "c" * 64}})
    (write_adapter(tmp_path / "swift") / "manifest.json").write_bytes(manifest.encoded())
    fetched = await inputs.fetch(at(tmp_path / "swift"), "adapter")
    assert (fetched.digest, fetched.made_by) == (manifest.digest, manifest.made_by)


async def test_an_adapter_without_one_is_known_by_its_content_and_a_model_by_none(
    inputs: Inputs, tmp_path: Path
) -> None:
    first = await inputs.fetch(at(write_adapter(tmp_path / "a", seed=1)), "adapter")
    same = await inputs.fetch(at(write_adapter(tmp_path / "b", seed=1)), "adapter")
    other = await inputs.fetch(at(write_adapter(tmp_path / "c", seed=2)), "adapter")
    assert first.digest == same.digest != other.digest
    assert (await inputs.fetch(at(write_base(tmp_path / "base")), "model")).digest is None


async def test_the_hub_gives_a_commit_and_its_faults_are_told(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelInput(field="model.from", reference="hf://a/b", hugging_face=HubModel(repo="a/b", revision="main"))
    commit = write_base(tmp_path / "0123abcd")
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched = await inputs.fetch(source, "model")
    assert fetched.digest == "sha256:" + hashlib.sha256(b"0123abcd").hexdigest()
    assert (asked[0]["repo"], asked[0]["revision"]) == ("a/b", "main")
    assert "*.bin" not in asked[0]["allow_patterns"]

    def fail(*_: object, **__: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Unservable, match="no route to the hub") as caught:
        await inputs.fetch(source, "model")
    assert caught.value.transient


async def test_how_far_a_download_is_can_be_followed(inputs: Inputs, storage: Storage, tmp_path: Path) -> None:
    place: S3Place = storage.put(write_base(tmp_path / "base"), f"s3://models/{tmp_path.name}/base")
    told: list[tuple[int, int]] = []
    source = ModelInput(field="model.from", reference="r", s3=place)
    fetched = await inputs.fetch(source, "model", lambda done, whole: told.append((done, whole)))
    assert told[-1][0] == told[-1][1] > 0
    assert json.loads((fetched.path / "config.json").read_text())["model_type"] == "llama"


async def test_a_source_that_names_nothing_is_an_error_of_the_spec(inputs: Inputs) -> None:
    with pytest.raises(Unservable) as caught:
        await inputs.fetch(ModelInput(field="model.from", reference="r"), "model")
    assert caught.value.reason is Reason.SPEC_INVALID
