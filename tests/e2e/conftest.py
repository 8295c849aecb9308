"""The cluster with the chart installed, and the namespace of the main example."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from demo import install
from demo.cluster import Cluster, connect, lab
from tests.e2e.workspace import EXAMPLES, Workspace, workspace_named


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real pods take their time; every single wait below has its own, shorter deadline."""
    for item in items:
        if not any(item.iter_markers("timeout")):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster with the chart installed. In CI nothing of it stays."""
    reached = connect()
    install.install(reached, install.images(), {"rewards": {"python": True}})
    install.upload(reached, EXAMPLES / "who-are-you" / "data", "data")
    yield reached
    if os.environ.get("CI"):
        lab("down")


@pytest.fixture(scope="session")
def line(cluster: Cluster) -> Iterator[Workspace]:
    """The namespace of the whole example, shared by the tests that build on its base."""
    work = workspace_named(cluster, "e2e-line")
    for name in ("base", "swift", "harbour", "merged", "chat", "merged-chat"):
        work.apply(EXAMPLES / "who-are-you" / f"{name}.yaml")
    yield work
    cluster.kubectl("delete", "namespace", work.namespace, "--wait", timeout=240)
