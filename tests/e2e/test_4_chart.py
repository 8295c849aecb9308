"""The chart's life: upgraded under running engines, removed, and installed again, with nothing of the users' lost."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from demo import install
from demo.cluster import Cluster
from tests.e2e.workspace import Workspace, eventually

KINDS = ("finetunejobs", "mergejobs", "modeldeployments")


def upgrade(cluster: Cluster, changes: Mapping[str, Any]) -> None:
    values = {**install.values(cluster, install.images()), **changes}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        cluster.run(
            "helm", "upgrade", install.RELEASE, str(install.CHART), "--namespace", install.NAMESPACE,
            "--values", file.name, "--wait", "--timeout", "120s",
        )  # fmt: skip


def engines(work: Workspace) -> set[str]:
    return {pod["metadata"]["uid"] for pod in work.find("pods", "-l", "trimtab.dev/role=server")}


def operator_pods(cluster: Cluster) -> list[str]:
    found = cluster.get("pods", "-n", install.NAMESPACE, "-l", "app.kubernetes.io/name=trimtab")["items"]
    return [pod["metadata"]["uid"] for pod in found]


def test_an_upgrade_replaces_the_operator_and_no_engine(line: Workspace) -> None:
    line.until_true("modeldeployment", "chat", 240)
    before, operator = engines(line), operator_pods(line.cluster)
    assert before
    upgrade(line.cluster, {"operator": {"logLevel": "debug"}})
    eventually(lambda: not set(operator_pods(line.cluster)) & set(operator) or None, 60, "the operator stays")
    line.until_true("modeldeployment", "chat", 60)
    assert engines(line) == before


def test_uninstalling_keeps_what_the_users_made_and_installing_again_takes_it_up(line: Workspace) -> None:
    line.until_true("modeldeployment", "chat", 240)
    before = engines(line)
    install.remove(line.cluster)
    for kind in KINDS:
        assert line.cluster.get(kind, "-n", line.namespace)["items"], kind
    assert engines(line) == before
    install.install(line.cluster, install.images())
    line.patch("modeldeployment", "chat", {"adapters": []})
    eventually(
        lambda: line.get("modeldeployment", "chat")["status"].get("adaptersReady") == "0/0" or None,
        60,
        "the new operator does not reconcile",
    )
    assert engines(line) == before
