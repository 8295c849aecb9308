"""Trackers: what is told at which step, by a real MLflow server and by what Weights & Biases keeps while offline."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.unit.trainer.conftest import run_config, spec, wait_for
from trimtab_api.contract import ProgressReport, RunConfig
from trimtab_api.v1alpha1.progress import Progress
from trimtab_trainer import trackers
from trimtab_trainer.trackers.telling import FAILURES, Telling, news
from trimtab_trainer.trackers.tracker import parameters


def told(step: int, **values: Any) -> Progress:
    return Progress(step=step, total_steps=4, **values)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (told(0), told(1, loss=2.0, metrics={"rewards": 1.0}), {"loss": 2.0, "rewards": 1.0}),
        (told(1, loss=2.0), told(1, loss=2.0), {}),
        (told(1, loss=2.0, eval_loss=3.0), told(2, loss=2.0, eval_loss=3.0), {"loss": 2.0}),
        (told(2, loss=2.0), told(2, loss=2.0, eval_loss=3.0), {"eval_loss": 3.0}),
        (told(2, metrics={"eval_bleu": 1.0}), told(3, metrics={"eval_bleu": 1.0}), {}),
        (told(2, metrics={"eval_bleu": 1.0}), told(3, metrics={"eval_bleu": 2.0}), {"eval_bleu": 2.0}),
    ],
)
def test_what_is_new(before: Progress, now: Progress, expected: dict[str, float]) -> None:
    assert news(before, now) == expected


class Deaf:
    """A tracker that fails, or waits."""

    place = "a deaf tracker"

    def __init__(self, fails: int = 0, gate: threading.Event | None = None):
        self.fails, self.gate = fails, gate
        self.begun = 0
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[bool] = []

    def begin(self) -> None:
        self.begun += 1
        if self.gate is not None:
            self.gate.wait(30)
        if self.begun <= self.fails:
            raise ConnectionError("nobody is there")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def end(self, whole: bool) -> None:
        self.ended.append(whole)


def tell(telling: Telling, *each: Progress) -> None:
    for progress in each:
        telling.report(ProgressReport(attempt=1, progress=progress))


def test_a_tracker_that_comes_late_is_told_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Deaf(fails=1)
    telling = Telling(tracker)
    tell(telling, told(1, loss=3.0), told(2, loss=2.0), told(4, loss=1.0))
    telling.close()
    assert tracker.logged == [(2, {"loss": 2.0}), (4, {"loss": 1.0})]
    assert tracker.ended == [True]
    assert "a deaf tracker: ConnectionError: nobody is there" in caplog.text


def test_a_tracker_that_never_answers_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Deaf(fails=99)
    telling = Telling(tracker)
    tell(telling, *(told(step, loss=1.0) for step in range(1, 20)))
    telling.close()
    assert tracker.begun == FAILURES
    assert caplog.text.count("nobody is there") == FAILURES
    assert caplog.text.count("given up") == 1


def test_nobody_waits_for_a_tracker(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    telling = Telling(Deaf(gate=gate), close_seconds=0.2)
    began = time.monotonic()
    tell(telling, told(1, loss=3.0))
    telling.close()
    assert time.monotonic() - began < 5
    assert "was not told everything" in caplog.text
    gate.set()


def test_parameters_are_flat_and_hold_no_rows() -> None:
    config = run_config(spec("sft"), Path("/nowhere"))
    flat = parameters(config)
    assert flat["method"] == "sft"
    assert flat["training.learningRate"] == "0.002"
    assert flat["resolved.worldSize"] == "1"
    assert not [name for name in flat if "inline" in name]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{folder}/db", "--default-artifact-root", str(folder / "artifacts"),
            ],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        wait_for(lambda: server.poll() is not None or answers(f"{url}/health"), 120, "MLflow's server")
        assert server.poll() is None, (folder / "log").read_text()[-3000:]
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def tracked(reports: dict[str, Any]) -> RunConfig:
    return run_config(spec("sft", reports=reports), Path("/nowhere"), name="swift")


@pytest.mark.timeout(180)
def test_mlflow_has_one_run_for_all_attempts(mlflow_server: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = tracked({"mlflow": {"server": mlflow_server, "experiment": "ships"}})
    client = MlflowClient(tracking_uri=mlflow_server)
    for steps in ((1, 2), (3, 4)):
        (telling,) = trackers.of(config, tmp_path, tmp_path / "none")
        for step in steps:
            progress = told(step, loss=1 / step, metrics={"rewards/margins": float(step)})
            telling.report(ProgressReport(attempt=1, progress=progress))
        telling.close()
        experiment = client.get_experiment_by_name("ships")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == ("FINISHED" if steps == (3, 4) else "KILLED")
    assert run.info.run_name == f"{config.job.namespace}/swift"
    assert run.data.tags["trimtab.dev/uid"] == config.job.uid
    assert run.data.params["training.learningRate"] == "0.002"
    history = client.get_metric_history(run.info.run_id, "rewards/margins")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_keys_that_are_named_and_not_there_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlflow").mkdir()
    fields = {"server": "http://127.0.0.1:1", "experiment": "ships", "credentials": {"secretName": "mlflow-keys"}}
    (telling,) = trackers.of(tracked({"mlflow": fields}), tmp_path, tmp_path)
    telling.report(ProgressReport(attempt=1, progress=told(1, loss=1.0)))
    telling.close()
    assert "Secret mlflow-keys is not there or holds neither MLFLOW_TRACKING_TOKEN nor" in caplog.text


@pytest.mark.timeout(180)
def test_weights_and_biases_keeps_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "keys/wandb").mkdir(parents=True)
    (tmp_path / "keys/wandb/WANDB_API_KEY").write_text("k" * 40)
    config = tracked({"wandb": {"project": "ships", "entity": "acme", "credentials": {"secretName": "wandb"}}})
    with caplog.at_level(logging.WARNING):
        (telling,) = trackers.of(config, tmp_path, tmp_path / "keys")
        for step in (1, 2):
            progress = told(step, loss=1 / step, metrics={"rewards": float(step)})
            telling.report(ProgressReport(attempt=1, progress=progress))
        telling.close()
    assert not caplog.text
    records = kept(next(tmp_path.glob("wandb/wandb/offline-run-*/*.wandb")))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.entity) == (config.job.uid, "ships", "acme")
    told_it = [
        {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(each["_step"], each["loss"], each["rewards"]) for each in told_it] == [
        ("1", "1", "1"),
        ("2", "0.5", "2"),
    ]
    written = [path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert written
    assert not [each for each in written if b"k" * 40 in each]


def kept(file: Path) -> list[Any]:
    """The records of a run's file: LevelDB's log format, blocks of 32 KiB, after a head of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records
