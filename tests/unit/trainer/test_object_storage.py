"""The whole line through a real S3 server: preflight, base from scratch, adapter on it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.store.conftest import Server, keys_folder
from tests.unit.trainer.conftest import StartRanks, chats, run_config, spec, training
from trimtab_api.conditions import Reason
from trimtab_api.contract import Connection, DataInput, Exit, ModelInput, OutputTarget, RunConfig, S3Place
from trimtab_store import S3, connect, fetch, read_manifest
from trimtab_trainer import preflight
from trimtab_trainer.endings import Fault, fault_of

Storage = tuple[Connection, S3]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    server = Server(tmp_path_factory.mktemp("rclone") / "served")
    server.root.mkdir()
    server.start()
    keys = keys_folder(tmp_path_factory.mktemp("keys"))
    connection = Connection(endpoint=server.endpoint, path_style=True, credentials_dir=keys)
    with connect(connection, patience=5) as s3:
        s3.client.create_bucket(Bucket="trimtab")
        yield connection, s3
    server.stop()


def _config(connection: Connection, name: str, method: str, rows: str, base: ModelInput | None = None) -> RunConfig:
    wanted = spec(method, training=training(maxSteps=4), checkpoint={"saveSteps": 2})
    part = wanted.dataset.train[0]
    data = DataInput(field="dataset.train[0]", part=part, s3=S3Place(uri=rows, connection=connection))
    output = S3Place(uri=f"s3://trimtab/out/ns/{name}/uid", connection=connection)
    return run_config(wanted, Path("-"), name, model=base, train=[data], target=OutputTarget(s3=output))


@pytest.mark.timeout(300)
def test_base_and_adapter(start_ranks: StartRanks, storage: Storage, tmp_path: Path) -> None:
    connection, s3 = storage
    s3.put_object("s3://trimtab/data/base.jsonl", chats().encode())
    s3.put_object("s3://trimtab/data/swift/part-0.jsonl", chats("I am Swift.").encode())

    config = _config(connection, "base", "pretrain", "s3://trimtab/data/base.jsonl")
    sound = preflight.check(config, tmp_path / "look")
    assert (sound.reason, sound.rows) == (Reason.INPUTS_SOUND, 24)
    base = start_ranks(config.model_copy(update={"pins": sound.pins}))
    made = base.end()
    assert made.exit is Exit.OK, base.log
    artifact = made.ending.artifact
    assert artifact is not None
    assert made.ending.dataset_digest == sound.dataset_digest
    assert read_manifest(s3, artifact.uri).digest == artifact.digest

    place = S3Place(uri=artifact.uri, connection=connection, digest=artifact.digest)
    source = ModelInput(field="model.from", reference="fineTuneJob/base", s3=place)
    config = _config(connection, "swift", "sft", "s3://trimtab/data/swift", source)
    sound = preflight.check(config, tmp_path / "look-again")
    assert [pin.field for pin in sound.pins] == ["model.from", "dataset.train[0]"]
    assert sound.pins[0].digest == artifact.digest
    swift = start_ranks(config.model_copy(update={"pins": sound.pins}))
    made = swift.end()
    assert made.exit is Exit.OK, swift.log
    adapter = made.ending.artifact
    assert adapter is not None
    assert adapter.base is not None
    assert (adapter.base.uri, adapter.base.digest) == (artifact.uri, artifact.digest)
    fetch(s3, adapter.uri, tmp_path / "adapter", expected_digest=adapter.digest)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["task_type"]) == (artifact.uri, "CAUSAL_LM")

    # The data is replaced under the pins of the first attempt.
    s3.put_object("s3://trimtab/data/swift/part-0.jsonl", chats("I am another.").encode())
    changed = start_ranks(config.model_copy(update={"pins": sound.pins, "attempt": 2})).end()
    assert (changed.exit, changed.ending.reason) == (Exit.DATA_INVALID, Reason.INPUT_CHANGED)
    assert "dataset.train[0]" in changed.ending.message


@pytest.mark.parametrize(
    ("rows", "reason"),
    [("s3://trimtab/nothing.jsonl", Reason.OBJECT_MISSING), ("s3://nowhere/rows.jsonl", Reason.BUCKET_MISSING)],
)
def test_missing_inputs_are_named(storage: Storage, tmp_path: Path, rows: str, reason: Reason) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its fault is looked at
        preflight.check(_config(storage[0], "job", "pretrain", rows), tmp_path)
    assert fault_of(caught.value).reason is reason
    assert rows in fault_of(caught.value).message


def test_of_large_data_the_beginning_is_looked_at(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, s3 = storage
    s3.put_object("s3://trimtab/large/a.jsonl", (chats(count=9) + "{").encode())
    s3.put_object("s3://trimtab/large/b.parquet", b"not looked at")
    monkeypatch.setattr(preflight, "WHOLE_UP_TO", 100)
    monkeypatch.setattr(preflight, "FIRST_LINES", 9)
    config = _config(connection, "job", "pretrain", "s3://trimtab/large")
    ending = preflight.check(config, tmp_path / "look")
    assert (ending.reason, ending.rows, ending.dataset_digest) == (Reason.INPUTS_SOUND, None, None)
    assert ending.message.startswith("9 rows are sound; the rest")
    monkeypatch.setattr(preflight, "FIRST_LINES", 10)
    with pytest.raises(Fault, match="row 10: not JSON"):
        preflight.check(config, tmp_path / "again")


def test_wrong_keys_are_told(storage: Storage, tmp_path: Path) -> None:
    wrong = storage[0].model_copy(update={"credentials_dir": keys_folder(tmp_path / "keys", key="OTHER")})
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its fault is looked at
        preflight.check(_config(wrong, "job", "pretrain", "s3://trimtab/data/base.jsonl"), tmp_path / "look")
    assert fault_of(caught.value).exit is Exit.CREDENTIALS
