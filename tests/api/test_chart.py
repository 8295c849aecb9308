"""The chart against a real API server: every object is taken, and the rights are enough and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import ports, tools
from lab.controlplane import ControlPlane
from lab.run import run
from trimtab_api import names
from trimtab_api.v1alpha1 import RESOURCES

ROOT = Path(__file__).resolve().parents[2]
Chart = Callable[..., str]
Kubectl = Callable[..., str]

WITHOUT_FOREIGN_KINDS = (
    "--set", "metrics.serviceMonitor.enabled=false", "--set", "metrics.podMonitor.enabled=false",
)  # fmt: skip


@pytest.mark.parametrize("case", ["default", "full", "namespaced"])
def test_every_object_is_taken(chart_objects: Chart, kubectl: Kubectl, case: str) -> None:
    """Strict: a field that the API server does not know is an error, for hooks and tests as well."""
    values = ROOT / "tests" / "golden" / "chart" / f"{case}.values.yaml"
    for each in ("research", "products"):
        kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": each}}
        ))  # fmt: skip
    rendered = chart_objects("--values", str(values), *WITHOUT_FOREIGN_KINDS, "--set", "crds.enabled=false")
    kubectl("create", "--validate=strict", "--dry-run=server", "-f", "-", stdin=rendered)


def test_chart_and_crds_folder_install_the_same_kinds(chart_objects: Chart, kubectl: Kubectl) -> None:
    for plural in ("finetunejobs", "mergejobs", "modeldeployments"):
        rendered = chart_objects("--show-only", f"templates/crds/{plural}.yaml")
        options = ("--server-side", "--force-conflicts", "--dry-run=server", "-o", "json", "-f", "-")
        dry = json.loads(kubectl("apply", *options, stdin=rendered))
        present = json.loads(kubectl("get", "crd", f"{plural}.{names.GROUP}", "-o", "json"))
        assert dry["spec"] == present["spec"]


ACCOUNT = "system:serviceaccount:trimtab-system:trimtab-operator"


def may(api: Any, verb: str, resource: str, namespace: str = "") -> bool:
    """Whether the API server lets the operator's account do this; no namespace means in all of them."""
    whole, _, subresource = resource.partition("/")
    plural, _, group = whole.partition(".")
    wanted = {"verb": verb, "group": group, "resource": plural, "subresource": subresource, "namespace": namespace}
    review = {"spec": {"user": ACCOUNT, "resourceAttributes": wanted}}
    answer = api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    assert answer.accepted, answer.message
    return bool(answer.body["status"]["allowed"])


RBAC = "rbac.authorization.k8s.io"
FORBIDDEN = (
    ("get", "secrets"), ("list", "secrets"), ("watch", "secrets"), ("create", "pods"), ("create", "pods/exec"),
    ("create", "pods/attach"), ("get", "pods/log"), ("get", "nodes"), ("create", f"clusterroles.{RBAC}"),
    ("escalate", f"roles.{RBAC}"), ("bind", f"roles.{RBAC}"), ("impersonate", "users"),
    ("update", "finetunejobs.trimtab.dev"), ("patch", "modeldeployments.trimtab.dev"),
    ("delete", "modeldeployments.trimtab.dev"), ("delete", "namespaces"),
    ("delete", "pods"), ("delete", "configmaps"), ("create", "serviceaccounts/token"),
)  # fmt: skip


@pytest.mark.parametrize(("verb", "resource"), FORBIDDEN, ids=lambda value: value.replace("/", "."))
def test_operator_may_not(api: Any, operator_kubeconfig: Path, verb: str, resource: str) -> None:
    assert not may(api, verb, resource, namespace="default")


ALLOWED = (
    ("list", "finetunejobs.trimtab.dev"), ("update", "mergejobs.trimtab.dev/status"),
    ("create", "pytorchjobs.kubeflow.org"), ("watch", "pods"), ("create", "events"),
)  # fmt: skip


@pytest.mark.parametrize(("verb", "resource"), ALLOWED, ids=lambda value: value.replace("/", "."))
def test_operator_may(api: Any, operator_kubeconfig: Path, verb: str, resource: str) -> None:
    assert may(api, verb, resource)


def until(holds: Callable[[], Any], what: str, process: subprocess.Popen[str], log: Path, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.fixture
def running(
    operator_kubeconfig: Path, chart_objects: Chart, namespace: str, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The operator as a process under the chart's rights and with the chart's settings, for one namespace."""
    values = ("--set", "storage.output=s3://models/runs", "--set", f"namespaces={{{namespace}}}")
    config = yaml.safe_load(chart_objects(*values, "--show-only", "templates/settings.yaml"))
    (tmp_path / "settings.json").write_text(config["data"]["settings.json"])
    log = tmp_path / "operator.log"
    command = [sys.executable, "-m", "trimtab_operator.main", "--settings", str(tmp_path / "settings.json")]
    health, figures = ports.free(2)
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, "--health-port", str(health), "--metrics-port", str(figures)],
            env={**os.environ, "KUBECONFIG": str(operator_kubeconfig)},
            stdout=written, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    yield process, log
    process.terminate()
    process.wait(timeout=30)


def test_rights_are_enough(running: tuple[subprocess.Popen[str], Path], api: Any, namespace: str) -> None:
    """All three kinds are worked on, a deployment is changed in every way that makes or removes a child of it."""
    process, log = running
    source = {"s3": {"uri": "s3://models/tiny"}}
    specs: dict[str, dict[str, Any]] = {
        "FineTuneJob": {"method": "sft", "model": {"from": source}, "dataset": {"train": [{"from": {"inline": "{}"}}]}},
        "MergeJob": {"adapters": [{"from": source}]},
        "ModelDeployment": {"model": {"from": source}, "replicas": 2},
    }
    for resource in RESOURCES:
        body = {"apiVersion": names.API_VERSION, "kind": resource.kind, "metadata": {"name": "r"}}
        made = api.create(namespace, resource.plural, {**body, "spec": specs[resource.kind]})
        assert made.accepted, made.message

    def there(path: str) -> bool:
        return bool(api.request("GET", f"{path}").accepted)

    core, apps, policy = (
        f"/api/v1/namespaces/{namespace}", f"/apis/apps/v1/namespaces/{namespace}",
        f"/apis/policy/v1/namespaces/{namespace}",
    )  # fmt: skip
    for path in (
        f"/apis/batch/v1/namespaces/{namespace}/jobs/{names.preflight('r')}",
        f"{core}/services/{names.server('r')}",
        f"{core}/serviceaccounts/{names.server('r')}",
        f"{core}/configmaps/{names.serving_reports('r')}",
        f"{apps}/deployments/{names.server('r')}",
        f"{policy}/poddisruptionbudgets/{names.server('r')}",
    ):
        until(lambda path=path: there(path), f"{path} is made", process, log)  # type: ignore[misc]
    until(
        lambda: api.request("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs").body["items"][1:],
        "the merge's Job is made", process, log,
    )  # fmt: skip
    for resource in RESOURCES:
        until(
            lambda resource=resource: api.read(namespace, resource.plural, "r").body.get("status"),  # type: ignore[misc]
            f"{resource.kind} has a status", process, log,
        )  # fmt: skip
    account = {
        "spec": {"replicas": 1, "pod": {"serviceAccountName": "own"}, "adapters": [{"name": "a", "from": source}]}
    }
    assert api.patch(namespace, "modeldeployments", "r", account).accepted
    for path in (f"{policy}/poddisruptionbudgets", f"{core}/serviceaccounts"):
        until(lambda path=path: not there(f"{path}/{names.server('r')}"), f"{path} is removed", process, log)  # type: ignore[misc]
    assert "orbidden" not in log.read_text()


@pytest.fixture(scope="module")
def aggregated(plane: ControlPlane, chart_objects: Chart) -> None:
    plane.kubectl("apply", "--server-side", "-f", "-", stdin=chart_objects("--show-only", "templates/aggregate.yaml"))


def test_editors_edit_our_kinds_and_get_no_other_right(plane: ControlPlane, aggregated: None) -> None:
    """There is no controller here that sums up aggregated roles, so the parts are read."""
    roles = json.loads(plane.kubectl("get", "clusterroles", "-l", "app.kubernetes.io/name=trimtab", "-o", "json"))
    parts = {
        role["metadata"]["name"]: role for role in roles["items"] if "aggregate" in str(role["metadata"]["labels"])
    }
    assert set(parts) == {"trimtab-view", "trimtab-edit"}
    granted = [rule for role in parts.values() for rule in role["rules"]]
    assert {group for rule in granted for group in rule["apiGroups"]} == {names.GROUP}
    assert not [name for rule in granted for name in rule["resources"] if "status" in name or "finalizers" in name]
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert prefix + "view" not in parts["trimtab-edit"]["metadata"]["labels"]


def evidence_pod(name: str, *finalizers: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {names.MANAGED_BY: names.MANAGED_BY_VALUE}, "finalizers": [*finalizers]},
        "spec": {"containers": [{"name": "pytorch", "image": "none"}]},
    }


def test_uninstalling_frees_the_pods_that_are_left(
    plane: ControlPlane, chart_objects: Chart, namespace: str, api: Any
) -> None:
    """As the hook runs it: with the hook's own rights and no other."""
    rights = chart_objects("--show-only", "templates/uninstall.yaml")
    plane.kubectl("apply", "--server-side", "--namespace", "trimtab-system", "-f", "-", stdin=rights)
    kubeconfig = plane.service_account_kubeconfig("trimtab-system", "trimtab-uninstall")
    pods = f"/api/v1/namespaces/{namespace}/pods"
    for pod in (
        evidence_pod("left", names.EVIDENCE_FINALIZER),
        evidence_pod("shared", "example.org/other", names.EVIDENCE_FINALIZER),
        evidence_pod("plain"),
    ):
        made = api.request("POST", pods, pod)
        assert made.accepted, made.message
    assert api.request("DELETE", f"{pods}/left").accepted
    assert api.request("GET", f"{pods}/left").body["metadata"]["deletionTimestamp"]
    done = subprocess.run(
        [sys.executable, "-m", "trimtab_operator.uninstall"],
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 pods are free to go\n"
    assert api.request("GET", f"{pods}/left").status == 404
    assert api.request("GET", f"{pods}/shared").body["metadata"]["finalizers"] == ["example.org/other"]


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[ControlPlane]:
    """An API server that knows none of our kinds, as a user's does before the chart comes."""
    with ControlPlane(tmp_path / "plane") as running:
        yield running


def kinds(plane: ControlPlane) -> set[str]:
    found = json.loads(plane.kubectl("get", "crd", "-o", "json"))["items"]
    return {each["metadata"]["name"] for each in found}


def settings(plane: ControlPlane) -> dict[str, Any]:
    read = plane.kubectl("get", "configmap", "trimtab-operator", "-n", "trimtab-system", "-o", "json")
    return dict(json.loads(json.loads(read)["data"]["settings.json"]))


def test_life_of_a_release(bare: ControlPlane) -> None:
    """Installed, upgraded, removed, installed again: the kinds and the users' objects outlive it, by default.

    No pod runs here, so the hook stays out; its work is tested above, and its pod on the cluster.
    """

    def helm(*words: str) -> None:
        chart = str(ROOT / "helm" / "trimtab")
        arguments = [chart if word == "CHART" else word for word in words]
        program = tools.ensure(["helm"])["helm"]
        run([program, "--kubeconfig", bare.kubeconfig, "--namespace", "trimtab-system", *arguments], timeout=120)

    def job(name: str) -> str:
        source = {"huggingFace": {"repo": "acme/tiny"}}
        spec = {"method": "sft", "model": {"from": source}, "dataset": {"train": [{"from": {"inline": "{}"}}]}}
        return json.dumps(
            {"apiVersion": names.API_VERSION, "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        )

    ours = {f"{plural}.{names.GROUP}" for plural in ("finetunejobs", "mergejobs", "modeldeployments")}
    helm("install", "trimtab", "CHART", "--create-namespace")
    assert kinds(bare) == ours
    bare.kubectl("wait", "--for=condition=Established", *(f"crd/{name}" for name in sorted(ours)))
    bare.kubectl("create", "-f", "-", stdin=job("kept"))
    before = bare.kubectl("get", "deployment", "trimtab-operator", "-n", "trimtab-system", "-o", "jsonpath={.spec}")

    helm("upgrade", "trimtab", "CHART", "--set", "storage.output=s3://models/runs", "--set", "operator.workers=2")
    assert settings(bare)["output"] == "s3://models/runs"
    assert settings(bare)["workers"] == 2
    after = bare.kubectl("get", "deployment", "trimtab-operator", "-n", "trimtab-system", "-o", "jsonpath={.spec}")
    assert before != after

    helm("uninstall", "trimtab", "--no-hooks")
    assert bare.kubectl("get", "clusterrole", "trimtab-operator", "-o", "name", "--ignore-not-found") == ""
    assert kinds(bare) == ours
    bare.kubectl("get", "finetunejob", "kept")

    helm("install", "trimtab", "CHART", "--set", "crds.keep=false")
    bare.kubectl("get", "finetunejob", "kept")
    helm("uninstall", "trimtab", "--no-hooks")
    bare.kubectl("wait", "--for=delete", *(f"crd/{name}" for name in sorted(ours)), "--timeout=30s")
    assert kinds(bare) == set()
