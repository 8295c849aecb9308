"""The kinds as a real API server takes them: served, explained, listed, scaled, and every example applied."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.controlplane import ControlPlane
from lab.report import LabError
from trimtab_api.names import GROUP
from trimtab_api.schema import RULES_KEY, Resource
from trimtab_api.v1alpha1 import FINE_TUNE_JOB, MODEL_DEPLOYMENT, RESOURCES
from trimtab_operator.crdgen import crd

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Kubectl = Callable[..., str]


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_kind_is_established_and_structural(kubectl: Kubectl, resource: Resource) -> None:
    found = json.loads(kubectl("get", "crd", f"{resource.plural}.{GROUP}", "-o", "json"))
    conditions = {condition["type"]: condition["status"] for condition in found["status"]["conditions"]}
    assert conditions == {"Established": "True", "NamesAccepted": "True"}
    assert found["status"]["storedVersions"] == ["v1alpha1"]


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_kind_fits_into_the_annotation_of_client_side_apply(kubectl: Kubectl, resource: Resource) -> None:
    file = next(path for path in (EXAMPLES.parent / "crds").iterdir() if resource.plural in path.name)
    kubectl("apply", "--dry-run=server", "-f", str(file))
    assert len(json.dumps(yaml.safe_load(file.read_text()))) < 262_144


@pytest.mark.parametrize("folder", sorted(path.name for path in EXAMPLES.iterdir()))
def test_every_example_is_accepted(kubectl: Kubectl, namespace: str, folder: str) -> None:
    files = sorted(path for path in (EXAMPLES / folder).iterdir() if path.suffix == ".yaml")
    wanted = sum(1 for file in files for _ in yaml.safe_load_all(file.read_text()))
    for file in files:
        kubectl("apply", "--namespace", namespace, "--filename", str(file))
    applied = json.loads(kubectl("get", "trimtab", "--namespace", namespace, "-o", "json"))["items"]
    assert len(applied) == wanted


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_columns_are_those_of_the_model(api: Any, resource: Resource) -> None:
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    table = api.request("GET", f"/apis/{GROUP}/v1alpha1/{resource.plural}", accept=accept).body
    assert table["kind"] == "Table"
    shown = [(each["name"], each["priority"]) for each in table["columnDefinitions"]]
    assert shown == [("Name", 0), *((column.name, column.priority) for column in resource.columns)]


def test_columns_show_the_status(kubectl: Kubectl, api: Any, namespace: str) -> None:
    made = api.create(namespace, "finetunejobs", {
        "apiVersion": f"{GROUP}/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "shown"},
        "spec": {
            "method": "sft",
            "model": {"from": {"huggingFace": {"repo": "acme/tiny"}}},
            "dataset": {"train": [{"from": {"inline": "{}"}}]},
        },
    })  # fmt: skip
    assert made.accepted, made.message
    condition = {
        "type": "Succeeded", "status": "Unknown", "reason": "Running", "message": "2 of 2 pods run",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    progress = {"step": 120, "totalSteps": 500, "steps": "120/500", "loss": 1.25, "eta": "4m10s"}
    written = api.patch(
        namespace, "finetunejobs", "shown",
        {"status": {"conditions": [condition], "progress": progress, "attempt": 2}}, subresource="status",
    )  # fmt: skip
    assert written.accepted, written.message
    line = kubectl("get", "ftj", "shown", "--namespace", namespace, "--no-headers", "-o", "wide").split()
    assert line[:7] == ["shown", "sft", "Running", "120/500", "1.25", "4m10s", "2"]
    assert line[-5:] == ["2", "of", "2", "pods", "run"]


def test_deployment_scales(kubectl: Kubectl, api: Any, namespace: str) -> None:
    model = {"from": {"huggingFace": {"repo": "acme/tiny"}}}
    body = {
        "apiVersion": f"{GROUP}/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "scaled"},
        "spec": {"model": model},
    }  # fmt: skip
    assert api.create(namespace, MODEL_DEPLOYMENT.plural, body).accepted
    status = {"status": {"replicas": 1, "selector": "trimtab.dev/name=scaled"}}
    assert api.patch(namespace, MODEL_DEPLOYMENT.plural, "scaled", status, subresource="status").accepted
    kubectl("scale", "mdep/scaled", "--namespace", namespace, "--replicas=3")
    path = f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/{MODEL_DEPLOYMENT.plural}/scaled/scale"
    scale = api.request("GET", path).body
    assert scale["spec"]["replicas"] == 3
    assert scale["status"] == {"replicas": 1, "selector": "trimtab.dev/name=scaled"}


@pytest.mark.parametrize("path", ["spec.tuner.lora.rank", "spec.training.learningRate", "spec.dataset.train.from.s3"])
def test_fields_explain_themselves(kubectl: Kubectl, path: str) -> None:
    told = kubectl("explain", f"finetunejob.{path}").split("DESCRIPTION:")[1].split("FIELDS:")[0].strip()
    assert told != "<empty>"
    assert told.endswith(".")


def without_rules(node: Any) -> Any:
    """A schema as an older version may have had it: no rule and no bound."""
    if isinstance(node, dict):
        dropped = (RULES_KEY, "maximum", "minimum", "maxLength", "pattern", "enum", "maxItems")
        return {key: without_rules(value) for key, value in node.items() if key not in dropped}
    return [without_rules(value) for value in node] if isinstance(node, list) else node


def test_object_older_than_a_rule_can_be_reported_on_and_deleted(tmp_path: Path) -> None:
    """A rule that comes with an upgrade must never strand what is there already."""
    with ControlPlane(tmp_path / "plane") as plane:
        document = crd(FINE_TUNE_JOB)
        version = document["spec"]["versions"][0]
        older = {
            **document,
            "spec": {**document["spec"], "versions": [{**version, "schema": without_rules(version["schema"])}]},
        }
        name = document["metadata"]["name"]
        plane.kubectl("create", "-f", "-", stdin=json.dumps(older))
        plane.kubectl("wait", "--for=condition=Established", f"crd/{name}")
        spec = {
            "method": "since-withdrawn",
            "model": {"from": {}},
            "dataset": {"train": [{"from": {"inline": "{}"}}]},
            "training": {"learningRate": -1},
        }
        body = {
            "apiVersion": f"{GROUP}/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "old.name"},
            "spec": spec,
        }
        plane.kubectl("create", "-f", "-", stdin=json.dumps(body))
        plane.kubectl("replace", "-f", "-", stdin=json.dumps({**document, "metadata": {"name": name}}))

        deadline = time.monotonic() + 30
        while "invalid" not in _said(plane, body):
            assert time.monotonic() < deadline, "the new rules do not come into force"
        started = '{"status": {"startTime": "2026-01-01T00:00:00Z", "attempt": 1}}'
        plane.kubectl("patch", "ftj", "old.name", "--subresource=status", "--type=merge", "-p", started)
        plane.kubectl("annotate", "ftj", "old.name", "seen=yes")
        plane.kubectl("delete", "ftj", "old.name", "--timeout=20s")


def _said(plane: ControlPlane, body: dict[str, Any]) -> str:
    probe = json.dumps({**body, "metadata": {"name": "probe"}})
    try:
        return plane.kubectl("create", "--dry-run=server", "-f", "-", stdin=probe)
    except LabError as refusal:
        return str(refusal)
