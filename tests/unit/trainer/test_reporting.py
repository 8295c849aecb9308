"""Progress over a real TLS connection, its silence when nobody listens, and the checks that a run makes of itself."""

from __future__ import annotations

import datetime
import ipaddress
import json
import math
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.ports import free_port
from tests.unit.trainer.conftest import wait_for
from trimtab_api.conditions import Reason
from trimtab_api.contract import ProgressReport
from trimtab_api.v1alpha1.progress import Progress
from trimtab_trainer.endings import Fault
from trimtab_trainer.progress import ConfigMapReporter, MetricsReporter, Several, eta_text


def _certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key").write_bytes(encoded)


class Api:
    """Takes patches of ConfigMaps, as the API server does."""

    def __init__(self, folder: Path) -> None:
        self.patches: list[tuple[str, str, Any]] = []
        self.status = 200
        taken = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken.patches.append((self.path, self.headers["Authorization"], json.loads(body)))
                self.send_response(taken.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "ca.crt", folder / "key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    _certificate(tmp_path)
    (tmp_path / "token").write_text("first\n")
    running = Api(tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(running.server.server_address[1]))
    yield running
    running.close()


def _report(step: int) -> ProgressReport:
    return ProgressReport(attempt=1, progress=Progress(step=step, total_steps=9, steps=f"{step}/9", loss=0.5))


def test_the_newest_report_is_told_with_the_newest_token(api: Api, tmp_path: Path) -> None:
    reporter = ConfigMapReporter("space", "job-progress", tmp_path, interval=0.05)
    reporter.report(_report(1))
    wait_for(lambda: len(api.patches) == 1, 10, "the first report")
    (tmp_path / "token").write_text("second\n")
    for step in range(2, 8):
        reporter.report(_report(step))
    reporter.close()
    path, token, body = api.patches[-1]
    assert path == "/api/v1/namespaces/space/configmaps/job-progress"
    assert token == "Bearer second"
    assert json.loads(body["data"]["progress.json"])["progress"]["steps"] == "7/9"
    assert len(api.patches) <= 4


@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_is_said_once_and_fails_nothing(
    api: Api, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    api.status = status
    reporter = ConfigMapReporter("space", "job-progress", tmp_path, interval=0.01)
    for step in range(3):
        reporter.report(_report(step))
        wait_for(lambda count=step: len(api.patches) > count, 10, "a report")  # type: ignore[misc]
    reporter.close()
    assert [record.message for record in caplog.records if str(status) in record.message] == [
        f"progress is not told to /api/v1/namespaces/space/configmaps/job-progress: the API server answered {status}"
    ]


def test_nobody_listening_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(free_port()))
    reporter = ConfigMapReporter("space", "job-progress", tmp_path, interval=0.01)
    reporter.report(_report(1))
    reporter.close()


def test_metrics_are_served() -> None:
    port = free_port()
    reporter = Several(MetricsReporter(port))
    told = _report(4)
    margin = told.progress.model_copy(update={"metrics": {"rewards/margins": 0.25}}) if told.progress else None
    reporter.report(told.model_copy(update={"progress": margin}))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    reporter.close()
    assert "trimtab_trainer_step 4.0" in text
    assert "trimtab_trainer_loss 0.5" in text
    assert 'trimtab_trainer_metric{name="rewards/margins"} 0.25' in text


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4s"), (250, "4m10s"), (7500, "2h05m"), (-1, "0s")])
def test_durations(seconds: float, text: str) -> None:
    assert eta_text(seconds) == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_finds_its_own_faults() -> None:
    import torch

    from trimtab_trainer.checkpoint import see_whole
    from trimtab_trainer.distributed import Group, Place
    from trimtab_trainer.movement import Movement
    from trimtab_trainer.watch import Watch

    alone = Group(Place(0, 0, 1, 1), 1, 60)
    watch = Watch(Several(), alone, SimpleNamespace(complete=[]), 1, 0)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=3, max_steps=9, epoch=0.5)
    with pytest.raises(Fault, match="the loss is nan at step 3") as caught:
        watch.on_log(None, state, None, logs={"loss": math.nan})
    assert caught.value.reason is Reason.ASSERTION_FAILED

    layer = torch.nn.Linear(4, 4)
    movement = Movement(layer)
    with pytest.raises(Fault, match="only 0 of 2"):
        movement.see(layer)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    movement.see(layer)
    with pytest.raises(Fault, match="no weight is trainable"):
        Movement(layer.requires_grad_(False))

    whole = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "window_0.json", "window_1.json", "rng_state_0.pth"}
    needed = {"optimizer.pt", "scheduler.pt"}
    see_whole(whole | {"rng_state_1.pth"}, 2, needed, "s3://b/c")
    with pytest.raises(Fault, match=r"rng_state_1.pth is missing for 2 processes"):
        see_whole(whole, 2, needed, "s3://b/c")
    with pytest.raises(Fault, match="WORLD_SIZE is 1"):
        Group(Place(0, 0, 1, 1), 2, 60)


HISTORY: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "rewards/margins": 0.1},
    {"step": 2, "epoch": 0.2, "eval_loss": 1.9, "eval_runtime": 3.0, "eval_samples_per_second": 4.0},
    {"step": 2, "epoch": 0.2, "loss": 1.5, "grad_norm": math.inf, "rewards/margins": 0.3, "note": "text"},
    {"step": 2, "train_runtime": 9.0, "train_loss": 1.7, "total_flos": 0.0},
]


def test_every_series_is_drawn_and_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trimtab_trainer import report

    about = report.About("job: <dpo>", {"rows": "40 & more"}, {"spec": {"method": "dpo"}})
    report.write(HISTORY, about, tmp_path)
    known = report.series(HISTORY)
    assert known["rewards/margins"] == [(1, 0.1), (2, 0.3)]
    assert set(known) == {"loss", "eval_loss", "learning_rate", "rewards/margins"}
    text = (tmp_path / "index.html").read_text()
    assert "job: &lt;dpo&gt;" in text
    assert "40 &amp; more" in text
    assert text.count("<svg") == 3
    assert "src=" not in text
    assert 'href="http' not in text
    assert text == report.page(HISTORY, about)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "eval/loss",
        "train/learning_rate",
        "train/rewards/margins",
    }
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_method_logs_reaches_the_status() -> None:
    from trimtab_trainer.distributed import Group, Place
    from trimtab_trainer.watch import METRICS_KEPT, Watch

    told: list[ProgressReport] = []
    reporter = SimpleNamespace(report=told.append, close=lambda: None)
    watch = Watch(reporter, Group(Place(0, 0, 1, 1), 1, 60), SimpleNamespace(complete=[]), 1, 0)  # type: ignore[arg-type]
    watch.trainer = SimpleNamespace(tokens_seen=64)
    state = SimpleNamespace(global_step=3, max_steps=9, epoch=0.5)
    watch.on_log(None, state, None, logs={"loss": 1.0, "rewards/margins": 0.123456789, "entropy": math.nan})
    watch.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 2.0})
    assert told[-1].progress is not None
    assert told[-1].progress.metrics == {"rewards/margins": 0.12346, "eval_accuracy": 0.5}
    watch.on_log(None, state, None, logs={"loss": 1.0, **{f"many/{n}": float(n) for n in range(99)}})
    assert told[-1].progress is not None
    assert len(told[-1].progress.metrics) == METRICS_KEPT
