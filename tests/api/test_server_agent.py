"""The agent against a real API server, with exactly the rights that the operator gives to a ModelDeployment's pods."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lab.controlplane import ControlPlane
from trimtab_api.contract import SERVE_KEY, ModelInput, ServeConfig, ServeModel
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_api.v1alpha1.modeldeployment import ResolvedServing
from trimtab_operator.modeldeployment import build
from trimtab_server.agent.cluster import Cluster, ClusterError

BASE = ServeModel(name="base", source=ModelInput(field="model.from", reference="r", path="/model"))


def serving(namespace: str) -> build.Serving:
    document = {
        "metadata": {"name": "chat", "namespace": namespace, "uid": "0"},
        "spec": {"model": {"from": {"s3": {"uri": "s3://models/base"}}}},
    }
    resolved = ResolvedServing(model_name="base")
    return build.Serving(ModelDeployment.read(document), resolved, ServeConfig(model=BASE))


def orphan(body: dict[str, Any]) -> dict[str, Any]:
    """Without its owner: there is none, and the garbage collector would see that."""
    body["metadata"].pop("ownerReferences", None)
    return body


@pytest.fixture
async def cluster(plane: ControlPlane, api: Any, namespace: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """The API server as the agent of ModelDeployment `chat` sees it."""
    made = serving(namespace)
    plane.service_account_kubeconfig(namespace, "chat-server", tmp_path / "kubeconfig")
    token = plane.kubectl("create", "token", "chat-server", "--namespace", namespace).strip()
    (tmp_path / "token").write_text(token)
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    for path, body in ((f"{rbac}/roles", build.role(made)), (f"{rbac}/rolebindings", build.role_binding(made))):
        answer = api.request("POST", path, orphan(body))
        assert answer.accepted, answer.message
    opened = Cluster(plane.server, namespace, tmp_path / "token", plane.authority.certificate)
    yield opened
    await opened.close()
    # A watch that was cut says goodbye over TLS by itself; aiohttp asks to leave the loop to it for a moment.
    await asyncio.sleep(0.25)


async def eventually(what: str, holds: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)


async def test_the_desired_map_is_followed_through_its_whole_life(
    plane: ControlPlane, api: Any, cluster: Cluster, namespace: str
) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    seen: list[str | None] = []

    async def follow() -> None:
        async for found in cluster.follow_config_map("chat-desired"):
            text = found["data"][SERVE_KEY] if found else None
            if not seen or seen[-1] != text:
                seen.append(text)

    def change(text: str) -> None:
        kind = "application/merge-patch+json"
        answer = api.request("PATCH", f"{maps}/chat-desired", {"data": {SERVE_KEY: text}}, kind=kind)
        assert answer.accepted, answer.message

    task = asyncio.create_task(follow())
    try:
        await eventually("absence is seen", lambda: seen == [None])
        assert api.request("POST", maps, orphan(build.desired(serving(namespace)))).accepted
        await eventually("it is found", lambda: len(seen) == 2)
        assert ServeConfig.read(json.loads(str(seen[1]))).model.name == "base"
        change("two")
        await eventually("a change is seen", lambda: seen[-1] == "two", 5)
        api.close()
        # Not in a thread: the lab's processes end with the thread that started them.
        plane.stop_apiserver()
        await asyncio.sleep(1)
        plane.start_apiserver()
        change("three")
        await eventually("what came after a restart of the server is seen", lambda: seen[-1] == "three", 30)
        assert api.request("DELETE", f"{maps}/chat-desired").accepted
        await eventually("its end is seen", lambda: seen[-1] is None)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_reports_are_patched_key_by_key_and_nothing_else_may_be(
    api: Any, cluster: Cluster, namespace: str
) -> None:
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    with pytest.raises(ClusterError, match="HTTP 404"):
        await cluster.patch_config_map("chat-reports", {"pod-0": "{}"})
    for name in ("chat-reports", "chat-desired", "somebody-elses"):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
        assert api.request("POST", maps, body).accepted
    await cluster.patch_config_map("chat-reports", {"pod-0": "zero"})
    await cluster.patch_config_map("chat-reports", {"pod-1": "one"})
    await cluster.patch_config_map("chat-reports", {"pod-0": None})
    assert api.request("GET", f"{maps}/chat-reports").body["data"] == {"pod-1": "one"}
    for name in ("chat-desired", "somebody-elses"):
        with pytest.raises(ClusterError, match="HTTP 403"):
            await cluster.patch_config_map(name, {"x": "y"})
