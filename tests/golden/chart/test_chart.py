"""The chart as Helm renders it, with nothing set, with everything set, and for a list of namespaces."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import tools
from lab.report import LabError
from lab.run import run
from trimtab_api import names
from trimtab_api.v1alpha1.source import Storage
from trimtab_operator.kube import ENDPOINTS
from trimtab_operator.settings import Settings

HERE = Path(__file__).parent
CHART = HERE.parents[2] / "helm" / "trimtab"
CASES = ("default", "full", "namespaced")

Render = Callable[..., str]
Objects = list[dict[str, Any]]


@pytest.fixture(scope="module")
def helm() -> Path:
    return tools.ensure(["helm"])["helm"]


@pytest.fixture(scope="module")
def render(helm: Path) -> Render:
    def rendered(*options: object) -> str:
        release = ("template", "trimtab", CHART, "--namespace", "trimtab-system", "--kube-version", "1.36.3")
        return run([helm, *release, *options], timeout=60).stdout

    return rendered


def objects(text: str) -> Objects:
    return [document for document in yaml.safe_load_all(text) if document]


def one(documents: Objects, kind: str, name: str = "") -> dict[str, Any]:
    found = [each for each in documents if each["kind"] == kind and (not name or each["metadata"]["name"] == name)]
    assert len(found) == 1, f"{len(found)} {kind} {name}"
    return found[0]


@pytest.mark.parametrize("case", CASES)
def test_renders_as_before(render: Render, case: str) -> None:
    """The kinds are left out: they have golden files of their own in crds/."""
    text = render("--values", HERE / f"{case}.values.yaml", "--set", "crds.enabled=false")
    golden = HERE / f"{case}.golden.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"differs from {golden.name}; UPDATE_GOLDEN=1 writes it anew"


ON_BY_DEFAULT = {
    "crds.enabled", "networkPolicy.enabled", "metrics.service.enabled", "rbac.create", "rbac.aggregate",
    "serviceAccount.create",
}  # fmt: skip
ELSEWHERE = {"namespaces"}


def test_full_values_set_every_value() -> None:
    """A new value must be given in full.values.yaml, so that a golden file shows its effect."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    full = yaml.safe_load((HERE / "full.values.yaml").read_text())
    del defaults["images"]
    for path in set(_leaves(defaults)) - ELSEWHERE:
        assert (_at(full, path) == _at(defaults, path)) == (path in ON_BY_DEFAULT), path


def _leaves(values: dict[str, Any], below: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{below}{key}.")
        else:
            yield f"{below}{key}"


def _at(values: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("case", CASES)
def test_reads_no_secret_and_opens_no_shell(render: Render, case: str) -> None:
    for each in objects(render("--values", HERE / f"{case}.values.yaml")):
        for rule in each.get("rules", []) if each["kind"] in ("Role", "ClusterRole") else []:
            named = set(rule["resources"]) | set(rule["apiGroups"]) | set(rule["verbs"])
            assert not named & {"secrets", "pods/exec", "pods/attach", "*", "escalate", "bind", "impersonate"}, rule


def test_namespaced_operator_has_no_right_beyond_its_namespaces(render: Render) -> None:
    documents = objects(render("--values", HERE / "namespaced.values.yaml"))
    assert not [each for each in documents if each["kind"].startswith("Cluster")]
    for kind in ("Role", "RoleBinding"):
        places = {
            each["metadata"]["namespace"]
            for each in documents
            if each["kind"] == kind and each["metadata"]["name"] == "trimtab-operator"
        }
        assert places == {"research", "products"}


@pytest.mark.parametrize("case", CASES)
def test_pods_satisfy_the_restricted_profile(render: Render, case: str) -> None:
    documents = objects(render("--values", HERE / f"{case}.values.yaml"))
    pods = [each["spec"]["template"]["spec"] for each in documents if each["kind"] in ("Deployment", "Job")]
    pods += [each["spec"] for each in documents if each["kind"] == "Pod"]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_selectors_meet_the_operator_and_no_other_pod(render: Render) -> None:
    """No network plug-in of the lab enforces policies, so what they select is proven here."""
    documents = objects(render("--set", "metrics.serviceMonitor.enabled=true"))
    operator = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    others = [one(documents, "Pod")["metadata"]["labels"]]
    others.append(one(documents, "Job")["spec"]["template"]["metadata"]["labels"])
    service = one(documents, "Service")
    for selector in (
        one(documents, "Deployment")["spec"]["selector"]["matchLabels"],
        one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        service["spec"]["selector"],
    ):
        assert selector.items() <= operator.items()
        assert not [labels for labels in others if selector.items() <= labels.items()]
    monitored = one(documents, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= service["metadata"]["labels"].items()
    assert operator[names.MANAGED_BY] != names.MANAGED_BY_VALUE, "it would be taken for a child of its own"


def test_ports_are_those_of_the_operator(render: Render) -> None:
    main = importlib.import_module("trimtab_operator.main")
    (container,) = one(objects(render()), "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"health": main.HEALTH_PORT, "metrics": main.METRICS_PORT}
    assert container["command"] == ["python", "-m", main.__name__]


def test_settings_follow_the_values(render: Render) -> None:
    documents = objects(render("--values", HERE / "full.values.yaml"))
    settings = json.loads(one(documents, "ConfigMap")["data"]["settings.json"])
    values = yaml.safe_load((HERE / "full.values.yaml").read_text())
    assert settings["output"] == values["storage"].pop("output")
    assert settings["storage"] == values["storage"]
    read = Settings.model_validate(settings)
    assert read.storage is not None
    assert read.storage.endpoint == "https://s3.example.org:9000"
    assert set(settings) | {"namespaces"} == {field.alias for field in Settings.model_fields.values()}
    assert settings["images"] == {
        "trainer": f"registry.example.org/mirror/ml/trainer@sha256:{1:064d}",
        "server": "other.example.org/server:exactly",
    }


@pytest.mark.parametrize("case", CASES)
def test_operator_reads_the_settings(render: Render, case: str) -> None:
    documents = objects(render("--values", HERE / f"{case}.values.yaml"))
    Settings.model_validate_json(one(documents, "ConfigMap")["data"]["settings.json"])


def test_operator_has_rights_on_the_kinds_of_its_client(render: Render) -> None:
    """None is missing, none is left over."""
    role = one(objects(render()), "ClusterRole", "trimtab-operator")
    granted = {
        (group, name): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for name in rule["resources"]
        if "/" not in name
    }
    known = {
        ("" if endpoint.prefix == "/api/v1" else endpoint.prefix.split("/")[2], endpoint.plural)
        for endpoint in ENDPOINTS.values()
    }
    assert set(granted) == known
    assert not [verbs for verbs in granted.values() if verbs & {"update", "deletecollection", "*"}]


def test_changed_settings_roll_the_operator(render: Render) -> None:
    def checksum(*options: str) -> str:
        deployment = one(objects(render(*options)), "Deployment")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["trimtab.dev/settings-checksum"])

    assert checksum() == checksum("--set", "metrics.podMonitor.enabled=true")
    assert checksum() != checksum("--set", "storage.region=eu-central-1")
    assert checksum() != checksum("--set", "images.trainer.tag=v2")


def test_kinds_come_and_stay_as_asked(render: Render) -> None:
    def kinds(*options: str) -> Objects:
        return [each for each in objects(render(*options)) if each["kind"] == "CustomResourceDefinition"]

    assert len(kinds()) == 3
    assert not kinds("--set", "crds.enabled=false")
    for keep, wanted in (("true", {"helm.sh/resource-policy": "keep"}), ("false", {})):
        for each in kinds("--set", f"crds.keep={keep}"):
            assert each["metadata"].get("annotations", {}) == wanted
            written = yaml.safe_load(
                (CHART.parents[1] / "crds" / f"{names.GROUP}_{each['spec']['names']['plural']}.yaml").read_text()
            )
            assert each["spec"] == written["spec"]


REFUSED = {
    "storage.endpont=x": "endpont",
    "storage.endpoint=https://key:secret@host": "/storage/endpoint",
    "storage.output=bucket/prefix": "/storage/output",
    "operator.workers=0": "/operator/workers",
    "operator.workers=many": "/operator/workers",
    "replicas=2": "replicas",
    "images.trainer.digest=sha256:12": "/images/trainer/digest",
    "namespaces={Upper}": "/namespaces/0",
    "metrics.serviceMonitor.interval=soon": "/metrics/serviceMonitor/interval",
    "serviceAccount.create=false": "name an existing account",
    "storage.credentials.accessKey=x": "/storage/credentials",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_wrong_value_is_refused_with_its_place(render: Render, setting: str) -> None:
    with pytest.raises(LabError, match=re.escape(REFUSED[setting])):
        render("--set", setting)


def test_schema_is_strict_everywhere() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert not [path for path, node in _objects(schema, "") if "additionalProperties" not in node and path not in FREE]


FREE = {
    ".global", ".operator.affinity", ".operator.tolerations[]", ".networkPolicy.metricsFrom[]",
}  # fmt: skip
"""What Kubernetes itself checks, and the value that every chart has."""


def _objects(node: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)] if node.get("type") == "object" else []
    for name, child in node.get("properties", {}).items():
        found += _objects(child, f"{path}.{name}")
    if isinstance(node.get("items"), dict):
        found += _objects(node["items"], f"{path}[]")
    return found


def test_storage_values_are_those_of_the_kind() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    fields = {field.alias for field in Storage.model_fields.values()}
    assert set(schema["properties"]["storage"]["properties"]) == fields | {"output"}


def test_helm_lints_clean(helm: Path) -> None:
    run([helm, "lint", "--quiet", "--strict", CHART], timeout=60)
