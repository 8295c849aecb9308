"""How far the work is: a ConfigMap in the cluster, a bar at a terminal, metrics for Prometheus.

Reporting never fails the work: what cannot be told is logged once and told again at the next step.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import threading
import time
from pathlib import Path
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from trimtab_api import contract
from trimtab_api.contract import ProgressReport

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
"""Shortest time between two patches."""
TIMEOUT_SECONDS = 5.0
"""Longest wait for the API server."""


class Reporter(Protocol):
    """Takes the newest report; may drop older ones."""

    def report(self, report: ProgressReport) -> None:
        """Take note of how far the work is. Never raises, never waits."""
        ...

    def close(self) -> None:
        """Tell the last report, waiting a few seconds at most."""
        ...


class Silent:
    """Tells nobody."""

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""

    def close(self) -> None:
        """See Reporter."""


class Several:
    """Tells several."""

    def __init__(self, *reporters: Reporter):
        self._reporters = reporters

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""
        for reporter in self._reporters:
            reporter.report(report)

    def close(self) -> None:
        """See Reporter."""
        for reporter in self._reporters:
            reporter.close()


class ConfigMapReporter:
    """Patches progress.json of one ConfigMap from a thread of its own, the newest report only."""

    def __init__(
        self,
        namespace: str,
        name: str,
        token_root: Path = Path(contract.TOKEN_ROOT),
        interval: float = INTERVAL_SECONDS,
    ):
        self._path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
        self._token_root = token_root
        self._interval = interval
        self._newest: ProgressReport | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""
        with self._changed:
            self._newest = report
            self._changed.notify()

    def close(self) -> None:
        """See Reporter."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=2 * TIMEOUT_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._closing)
                report, self._newest, closing = self._newest, None, self._closing
            if report is not None:
                self._tell(report)
            elif closing:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=self._interval)

    def _tell(self, report: ProgressReport) -> None:
        try:
            status = self._patch(report)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._complain(f"{type(error).__name__}: {error}")
            return
        if status >= 300:
            self._complain(f"the API server answered {status}")
        else:
            self._complained = False

    def _patch(self, report: ProgressReport) -> int:
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = int(os.environ.get("KUBERNETES_SERVICE_PORT", "443"))
        trust = ssl.create_default_context(cafile=str(self._token_root / "ca.crt"))
        # Read anew each time: the kubelet replaces the token long before it expires.
        token = (self._token_root / "token").read_text().strip()
        body = json.dumps({"data": {contract.PROGRESS_KEY: json.dumps(report.dump(), ensure_ascii=False)}})
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=trust)
        try:
            connection.request(
                "PATCH",
                self._path,
                body=body.encode(),
                headers={
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/merge-patch+json",
                    "User-Agent": "trimtab-trainer",
                },
            )
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    def _complain(self, problem: str) -> None:
        if not self._complained:
            log.warning("progress is not told to %s: %s", self._path, problem)
        self._complained = True


class MetricsReporter:
    """Gauges on contract.METRICS_PORT."""

    def __init__(self, port: int = contract.METRICS_PORT):
        import prometheus_client as prometheus

        registry = prometheus.CollectorRegistry()
        names = {
            "step": "Optimiser steps done.",
            "total_steps": "Optimiser steps in all.",
            "epoch": "Passes over the rows done.",
            "loss": "Loss of the last logged steps, mean over tokens.",
            "eval_loss": "Loss on the validation rows.",
            "learning_rate": "Learning rate of the last logged step.",
            "grad_norm": "Norm of the gradient before clipping.",
            "tokens_per_second": "Tokens of all processes per second.",
            "eta_seconds": "Seconds that are left at the present speed.",
        }
        self._gauges = {
            name: prometheus.Gauge(f"trimtab_trainer_{name}", text, registry=registry) for name, text in names.items()
        }
        self._metric = prometheus.Gauge(
            "trimtab_trainer_metric", "What the method logs besides, by its name.", ["name"], registry=registry
        )
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        try:
            self._server = prometheus.start_http_server(port, registry=registry)
        except OSError as error:
            log.warning("no metrics on port %d: %s", port, error)

    def report(self, report: ProgressReport) -> None:
        """See Reporter."""
        if report.progress is None:
            return
        for name, gauge in self._gauges.items():
            value = getattr(report.progress, name)
            if value is not None:
                gauge.set(value)
        for name, value in report.progress.metrics.items():
            self._metric.labels(name).set(value)

    def close(self) -> None:
        """See Reporter."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join(timeout=TIMEOUT_SECONDS)


def eta_text(seconds: float) -> str:
    """A duration as people read it: 45s, 4m10s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def now_text() -> str:
    """This moment, RFC 3339 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
