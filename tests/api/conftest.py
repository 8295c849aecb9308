"""A real API server for a session: etcd and kube-apiserver of the lab, our kinds, training-operator's kinds.

There is no kubelet and no scheduler here: tests that need pods to run play these by writing statuses.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from lab import tools
from lab.controlplane import ControlPlane
from lab.run import run

ROOT = Path(__file__).resolve().parents[2]
GROUP = "/apis/trimtab.dev/v1alpha1"
OPERATOR_NAMESPACE = "trimtab-system"
OPERATOR_ACCOUNT = "trimtab-operator"


@dataclass(frozen=True)
class Answer:
    """What the API server said."""

    status: int
    body: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))

    @property
    def causes(self) -> list[tuple[str, str]]:
        """Field and message of each mistake that was found."""
        causes = self.body.get("details", {}).get("causes", [])
        return [(cause.get("field", ""), cause.get("message", "")) for cause in causes]


class Api:
    """The administrator's requests over one kept connection: a table of a hundred rows takes a second."""

    def __init__(self, plane: ControlPlane) -> None:
        pair = plane.authority.issue("admin", "/O=system:masters/CN=admin")
        self._tls = ssl.create_default_context(cafile=str(plane.authority.certificate))
        self._tls.load_cert_chain(pair.certificate, pair.key)
        self._host = urlsplit(plane.server).netloc
        self._connection: http.client.HTTPSConnection | None = None

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        kind: str = "application/json",
        accept: str = "application/json",
        **query: str,
    ) -> Answer:
        headers = {"Content-Type": kind, "Accept": accept}
        data = None if body is None else json.dumps(body)
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(self._host, timeout=30, context=self._tls)
        try:
            self._connection.request(method, f"{path}?{urlencode(query)}", data, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (http.client.HTTPException, OSError):
            self.close()
            raise
        warnings = tuple(value for name, value in answer.getheaders() if name.lower() == "warning")
        return Answer(answer.status, json.loads(content), warnings)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def create(self, namespace: str, plural: str, body: dict[str, Any], **query: str) -> Answer:
        """POST with strict field validation, as kubectl does."""
        path = f"{GROUP}/namespaces/{namespace}/{plural}"
        return self.request("POST", path, body, **{"fieldValidation": "Strict", **query})

    def read(self, namespace: str, plural: str, name: str) -> Answer:
        return self.request("GET", f"{GROUP}/namespaces/{namespace}/{plural}/{name}")

    def patch(self, namespace: str, plural: str, name: str, body: Any, subresource: str = "", **query: str) -> Answer:
        path = f"{GROUP}/namespaces/{namespace}/{plural}/{name}" + (f"/{subresource}" if subresource else "")
        strict = {"fieldValidation": "Strict", **query}
        return self.request("PATCH", path, body, kind="application/merge-patch+json", **strict)


def established(kubectl: Callable[..., str], *names: str, deadline: float = 30) -> None:
    """Wait until the API server serves these kinds."""
    kubectl("wait", "--for=condition=Established", f"--timeout={deadline:.0f}s", *(f"crd/{name}" for name in names))


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane with the garbage collector, and every kind that the operator meets."""
    state = tmp_path_factory.mktemp("plane")
    with ControlPlane(state, controllers=("garbage-collector-controller", "namespace-controller")) as running:
        crds = tools.manifests() / "base" / "crds"
        running.kubectl("apply", "--server-side", "-f", str(crds / "kubeflow.org_pytorchjobs.yaml"))
        running.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
        kinds = [f"{plural}.trimtab.dev" for plural in ("finetunejobs", "mergejobs", "modeldeployments")]
        established(running.kubectl, "pytorchjobs.kubeflow.org", *kinds)
        yield running


@pytest.fixture(scope="session")
def admin_kubeconfig(plane: ControlPlane) -> Path:
    """The administrator's kubeconfig."""
    return plane.kubeconfig


@pytest.fixture(scope="session")
def kubectl(plane: ControlPlane) -> Callable[..., str]:
    """kubectl as administrator: kubectl("get", "pods", stdin=None) -> stdout; LabError on failure."""
    return plane.kubectl


@pytest.fixture(scope="session")
def api(plane: ControlPlane) -> Iterator[Api]:
    """Requests as administrator, without a program to start for each."""
    client = Api(plane)
    # A kind is Established a moment before its path is served.
    deadline = time.monotonic() + 30
    while not client.request("GET", f"{GROUP}/modeldeployments").accepted:
        assert time.monotonic() < deadline, "our kinds are not served after 30 s"
    yield client
    client.close()


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    """A fresh namespace's name; it is deleted at the end, and nobody waits for that."""
    name = f"t-{uuid.uuid4().hex[:10]}"
    made = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    assert made.accepted, made.message
    yield name
    api.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def chart_objects() -> Callable[..., str]:
    """The chart as Helm renders it: chart_objects("--set", "namespaces={a,b}", namespace="x") -> YAML."""

    def render(*options: str, namespace: str = OPERATOR_NAMESPACE) -> str:
        argv = [tools.ensure(["helm"])["helm"], "template", "trimtab", ROOT / "helm" / "trimtab"]
        return run([*argv, "--namespace", namespace, "--kube-version", "1.36.3", *options], timeout=60).stdout

    return render


@pytest.fixture(scope="session")
def operator_kubeconfig(plane: ControlPlane, chart_objects: Callable[..., str]) -> Path:
    """A kubeconfig with exactly the rights that the chart gives to the operator, and no other."""
    path = plane.service_account_kubeconfig(OPERATOR_NAMESPACE, OPERATOR_ACCOUNT)
    for template in ("rbac", "aggregate"):
        rendered = chart_objects("--show-only", f"templates/{template}.yaml")
        plane.kubectl("apply", "--server-side", "-f", "-", stdin=rendered)
    return path
