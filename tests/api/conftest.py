"""A real API server for a session: etcd and kube-apiserver of the lab, our kinds, training-operator's kinds.

There is no kubelet and no scheduler here: tests that need pods to run play these by writing statuses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import tools
from lab.controlplane import ControlPlane
from lab.run import run
from tests.api.client import GROUP, Api
from tests.api.stage import OperatorProcess
from trimtab_api import names
from trimtab_api.v1alpha1 import RESOURCES

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_NAMESPACE = "trimtab-system"
OPERATOR_ACCOUNT = "trimtab-operator"


def established(kubectl: Callable[..., str], *names: str, deadline: float = 30) -> None:
    """Wait until the API server serves these kinds."""
    kubectl("wait", "--for=condition=Established", f"--timeout={deadline:.0f}s", *(f"crd/{name}" for name in names))


def kinds_of(plane: ControlPlane) -> None:
    """Let a control plane serve our kinds and training-operator's."""
    crds = tools.manifests() / "base" / "crds"
    plane.kubectl("apply", "--server-side", "-f", str(crds / "kubeflow.org_pytorchjobs.yaml"))
    plane.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    ours = [f"{resource.plural}.{names.GROUP}" for resource in RESOURCES]
    established(plane.kubectl, "pytorchjobs.kubeflow.org", *ours)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane with the garbage collector, and every kind that the operator meets."""
    state = tmp_path_factory.mktemp("plane")
    with ControlPlane(state, controllers=("garbage-collector-controller", "namespace-controller")) as running:
        kinds_of(running)
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


@pytest.fixture(scope="module")
def operator(operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator under its own rights, for a module's tests; it must never have been at fault."""
    process = OperatorProcess(operator_kubeconfig, tmp_path_factory.mktemp("operator"))
    process.start()
    yield process
    if process.process is not None:
        process.stop()
    assert "this is a fault of the operator" not in process.log()
    assert "Traceback" not in process.log()
