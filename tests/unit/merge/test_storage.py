"""From a real S3 server to it: whole pods, killed pods, spoilt objects, what the model is published with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab_store as store
from tests.unit.merge.conftest import Models, Server, eventually, logits, peft_logits
from trimtab_api.conditions import Reason
from trimtab_api.contract import (
    Ending,
    Exit,
    JobIdentity,
    Manifest,
    MergeAdapterInput,
    MergeConfig,
    ModelInput,
    OutputTarget,
    S3Place,
)
from trimtab_api.v1alpha1.mergejob import MergeJobSpec
from trimtab_trainer.endings import Fault
from trimtab_trainer.merge.job import run

BUCKET = "s3://bucket"


class Bench:
    """A base and an adapter of it in object storage, and the merge.json that asks for them."""

    def __init__(self, server: Server, models: Models, name: str):
        self.server, self.name, self.work = server, name, models.root / "work"
        self.s3 = store.connect(server.connection, patience=5)
        self.base = models.base()
        (self.base / "tokenizer.json").write_text('{"of": "base"}')
        self.adapter = models.adapter(self.base)
        self.base_uri, self.adapter_uri = f"{BUCKET}/{name}/base", f"{BUCKET}/{name}/adapter"
        self.base_manifest = store.publish(self.s3, self.base, self.base_uri, {})
        self.publish_adapter()

    def publish_adapter(self) -> None:
        base = {"uri": self.base_uri, "digest": self.base_manifest.digest}
        self.manifest = store.publish(self.s3, self.adapter, self.adapter_uri, {"base": base})

    def config(self, **fields: Any) -> MergeConfig:
        place = S3Place(uri=self.adapter_uri, connection=self.server.connection, digest=self.manifest.digest)
        source = ModelInput(field="adapters[0].from", reference="fineTuneJob/harbour", s3=place)
        output = S3Place(uri=f"{BUCKET}/{self.name}/run", connection=self.server.connection)
        spec = MergeJobSpec.model_validate(
            {"adapters": [{"from": {"fineTuneJob": {"name": "harbour"}}}], "maxShardSize": "1MB", **fields}
        )
        return MergeConfig(
            job=JobIdentity(namespace="team", name="merged", uid="1-2-3"),
            spec=spec,
            adapters=[MergeAdapterInput(source=source)],
            output=OutputTarget(s3=output),
        )

    @property
    def output(self) -> Path:
        return self.server.root / self.name / "run" / "artifact"

    def start(self, config: MergeConfig, *command: str) -> subprocess.Popen[bytes]:
        """The pod's process."""
        self.work.mkdir(exist_ok=True)
        (self.work / "merge.json").write_text(config.model_dump_json(by_alias=True))
        environment = {
            "TRIMTAB_MERGE_FILE": str(self.work / "merge.json"),
            "TRIMTAB_WORK": str(self.work),
            "TRIMTAB_TERMINATION_LOG": str(self.work / "ending"),
        }
        with (self.work / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *(command or ("-m", "trimtab_trainer.merge"))],
                stderr=log,
                env=os.environ | environment,
            )

    def ending(self) -> Ending:
        return Ending.model_validate_json((self.work / "ending").read_text())


@pytest.fixture
def make(server: Server, models: Models, tmp_path: Path) -> Callable[[], Bench]:
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    return lambda: Bench(server, models, name)


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab_trainer.merge.job.parse_size", lambda text: 20_000)


def test_a_pod_publishes_and_says_what(make: Callable[[], Bench], tmp_path: Path) -> None:
    bench = make()
    process = bench.start(bench.config())
    assert process.wait(100) == Exit.OK, (bench.work / "log").read_text()
    ending = bench.ending()
    assert ending.reason is Reason.SUCCEEDED
    assert ending.artifact is not None
    assert ending.artifact.kind == "model"
    fetched = tmp_path / "fetched"
    store.fetch(bench.s3, ending.artifact.uri, fetched, expected_digest=ending.artifact.digest)
    torch.testing.assert_close(logits(fetched), peft_logits(bench.base, bench.adapter), atol=5e-5, rtol=1e-4)
    assert ending.artifact.size_bytes == sum(
        file.size for file in store.read_manifest(bench.s3, ending.artifact.uri).files
    )
    assert {(pin.uri, pin.digest) for pin in ending.pins} == {
        (bench.base_uri, bench.base_manifest.digest),
        (bench.adapter_uri, bench.manifest.digest),
    }
    arguments = json.loads((fetched / "args.json").read_text())
    assert arguments["base"] == {"uri": bench.base_uri, "digest": bench.base_manifest.digest}
    assert arguments["verification"]["method"] == "peft"
    assert "/tmp" not in (fetched / "args.json").read_text() + (fetched / "manifest.json").read_text()
    assert not (bench.output.parent / "merge.partial.json").exists()


def test_what_goes_along(make: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_shards(monkeypatch)
    bench = make()
    (bench.adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    (bench.adapter / "chat_template.jinja").write_text("{{ messages }}")
    (bench.adapter / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    bench.publish_adapter()
    outcome = run(bench.config(), tmp_path / "work")
    files = {file.path for file in outcome.manifest.files}
    assert "adapter_config.json" not in files
    assert json.loads((bench.output / "tokenizer.json").read_text()) == {"of": "adapter"}
    assert (bench.output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((bench.output / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 2
    index = json.loads((bench.output / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    for name in shards:
        tensors = load_file(bench.output / name)
        assert set(tensors) == {tensor for tensor, file in index["weight_map"].items() if file == name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1


def test_the_same_merge_gives_the_same_digest(
    make: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_shards(monkeypatch)
    bench = make()
    one = run(bench.config(), tmp_path / "one")
    monkeypatch.setattr("trimtab_trainer.merge.job.write", _not_again)
    again = run(bench.config(), tmp_path / "two")
    assert again.manifest.digest == one.manifest.digest


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_pod_is_gone_on_from(
    number: signal.Signals, make: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_shards(monkeypatch)
    bench = make()
    process = _slow(bench)
    eventually("some files are stored", lambda: len(list(bench.output.glob("model-*"))) >= 2 and _recorded(bench) >= 2)
    process.send_signal(number)
    code = process.wait(60)
    if number == signal.SIGTERM:
        assert code == Exit.PREEMPTED
        assert bench.ending().reason is Reason.PREEMPTED
    assert not (bench.output / "manifest.json").exists()
    stamps = {file["path"]: (bench.output / file["path"]).stat().st_mtime_ns for file in _record(bench)["files"]}
    reports: list[tuple[int, int]] = []
    outcome = run(bench.config(), tmp_path / "again", lambda done, total: reports.append((done, total)))
    assert len(stamps) >= 2
    assert reports[0] == (len(stamps), reports[-1][1]), "finished files are counted from the start"
    assert reports[-1][0] == reports[-1][1]
    for name, stamp in stamps.items():
        assert (bench.output / name).stat().st_mtime_ns == stamp, f"{name} was written again"
    for file in outcome.manifest.files:
        assert hashlib.sha256((bench.output / file.path).read_bytes()).hexdigest() == file.sha256
    torch.testing.assert_close(logits(bench.output), peft_logits(bench.base, bench.adapter), atol=5e-5, rtol=1e-4)


def test_the_leavings_of_another_merge_are_no_use(
    make: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_shards(monkeypatch)
    bench = make()
    process = _slow(bench)
    eventually("a file is stored", lambda: _recorded(bench) >= 1)
    process.kill()
    process.wait(60)
    bench.s3.put_object(f"{BUCKET}/{bench.name}/run/artifact/stray.safetensors", b"old")
    reports: list[int] = []
    outcome = run(bench.config(dtype="bfloat16"), tmp_path / "again", lambda done, total: reports.append(done))
    assert reports[0] == 0
    assert not (bench.output / "stray.safetensors").exists()
    dtypes = {tensor.dtype for path in bench.output.glob("*.safetensors") for tensor in load_file(path).values()}
    assert dtypes == {torch.bfloat16}
    assert outcome.manifest.digest == store.read_manifest(bench.s3, outcome.uri).digest


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_spoilt_base_is_noticed(
    which: str, make: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_shards(monkeypatch)
    bench = make()
    served = sorted((bench.server.root / bench.name / "base").glob("model-*.safetensors"))
    path = served[0 if which == "first" else -1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Fault, match=path.name) as caught:
        run(bench.config(), tmp_path / "work")
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    assert not (bench.output / "manifest.json").exists()


def test_another_version_of_the_adapter_is_refused(make: Callable[[], Bench], tmp_path: Path) -> None:
    bench = make()
    config = bench.config()
    (bench.adapter / "note.txt").write_text("changed")
    bench.publish_adapter()
    with pytest.raises(store.StorageError) as caught:
        run(config, tmp_path / "work")
    assert caught.value.reason is Reason.DIGEST_MISMATCH


def test_an_adapter_that_names_no_base(make: Callable[[], Bench], tmp_path: Path) -> None:
    bench = make()
    bench.base_uri = "fineTuneJob/base"
    bench.publish_adapter()
    with pytest.raises(Fault, match=r"adapters\[0\]\.from .* names no base that can be read from here") as caught:
        run(bench.config(), tmp_path / "work")
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_missing_bucket_ends_the_pod_with_its_code(make: Callable[[], Bench]) -> None:
    bench = make()
    config = bench.config()
    adapter = config.adapters[0].source
    assert adapter.s3 is not None
    lost = adapter.model_copy(update={"s3": adapter.s3.model_copy(update={"uri": "s3://nowhere/adapter"})})
    process = bench.start(config.model_copy(update={"adapters": [MergeAdapterInput(source=lost)]}))
    assert process.wait(100) == Exit.SPEC_INVALID
    assert bench.ending().reason is Reason.BUCKET_MISSING
    assert "s3://nowhere" in bench.ending().message


def _not_again(*_: object) -> None:
    raise AssertionError("a finished merge was made again")


_SLOWLY = """
import sys, time
import trimtab_trainer.merge.destination as destination
import trimtab_trainer.merge.job as job
from trimtab_trainer.merge.__main__ import main
job.parse_size = lambda text: 20_000
store = destination.S3Destination.store
def slowly(self, name, sha256):
    time.sleep(0.5)
    return store(self, name, sha256)
destination.S3Destination.store = slowly
sys.exit(main([]))
"""


def _slow(bench: Bench) -> subprocess.Popen[bytes]:
    """A pod that takes half a second for each file."""
    return bench.start(bench.config(), "-c", _SLOWLY)


def _record(bench: Bench) -> dict[str, Any]:
    path = bench.output.parent / "merge.partial.json"
    found: dict[str, Any] = json.loads(path.read_text() or "{}") if path.is_file() else {}
    return found


def _recorded(bench: Bench) -> int:
    return len(_record(bench).get("files", []))


def test_the_manifest_tells_what_it_was_made_from(make: Callable[[], Bench], tmp_path: Path) -> None:
    bench = make()
    outcome = run(bench.config(), tmp_path / "work")
    made_by = Manifest.model_validate_json((bench.output / "manifest.json").read_bytes()).made_by
    assert made_by["job"] == {"namespace": "team", "name": "merged", "uid": "1-2-3"}
    assert made_by["adapters"] == [{"uri": bench.adapter_uri, "digest": bench.manifest.digest, "weight": 1.0}]
    assert outcome.manifest.digest == Manifest.model_validate_json((bench.output / "manifest.json").read_bytes()).digest
