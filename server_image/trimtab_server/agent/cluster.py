"""The two things that the agent asks of the Kubernetes API: one ConfigMap's changes, and a patch of another.

Plain HTTPS with the pod's own short-lived token. A watch by `fieldSelector=metadata.name=` is the only form that a Role
limited by resourceNames allows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from trimtab_api.contract import TOKEN_ROOT

log = logging.getLogger("trimtab.agent.cluster")

WATCH_SECONDS = 90
"""How long one watch lasts. A connection that died without a word is noticed no later than this."""
REQUEST_SECONDS = 10.0
LONGEST_PAUSE = 15.0
"""Longest pause between tries while the API server does not answer, in seconds."""
LINE_LIMIT = 4 << 20
"""Longest watch event: a ConfigMap holds 1 MiB, and JSON in JSON doubles its quotes."""


class ClusterError(Exception):
    """The API server refused, or did not answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 0 when there was no answer."""


class Cluster:
    """The API server as this pod's ServiceAccount sees it."""

    def __init__(self, server: str, namespace: str, token_file: Path, ca_file: Path | None) -> None:
        self.namespace = namespace
        self._server = server
        self._token_file = token_file
        trust = ssl.create_default_context(cafile=str(ca_file)) if ca_file else None
        connector = aiohttp.TCPConnector(ssl=trust) if trust else aiohttp.TCPConnector()
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=LINE_LIMIT)

    @classmethod
    def of_this_pod(cls, root: Path = Path(TOKEN_ROOT)) -> Cluster:
        """The cluster that this pod runs in. Raises ClusterError outside of one."""
        try:
            host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
            namespace = (root / "namespace").read_text(encoding="utf-8").strip()
        except (KeyError, OSError) as error:
            raise ClusterError(
                f"this is no pod of a cluster ({error}); mount the token at {root}, or use --desired-file"
            ) from error
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, root / "token", root / "ca.crt")

    async def close(self) -> None:
        """Let go of the connections."""
        await self._session.close()

    async def follow_config_map(self, name: str) -> AsyncIterator[dict[str, Any] | None]:
        """The ConfigMap as it is, then again after each change, for ever; None while it does not exist.

        Every kind of end (time-out, 410, a restarted API server) leads to a new list and a new watch.
        """
        failures = 0
        while True:
            try:
                version, found = await self._list(name)
                failures = 0
                yield found
                async for each in self._watch(name, version):
                    yield each
            except ClusterError as error:
                failures += 1
                log.warning("watching ConfigMap %s: %s", name, error)
            await asyncio.sleep(_pause(failures))

    async def patch_config_map(self, name: str, data: dict[str, str | None]) -> None:
        """Merge these keys into the ConfigMap's data; None removes one. Raises ClusterError."""
        headers = {**self._headers(), "Content-Type": "application/merge-patch+json"}
        try:
            async with self._session.patch(
                f"{self._config_maps()}/{name}",
                params={"fieldManager": "trimtab-agent"},
                data=json.dumps({"data": data}),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            ) as answer:
                await _check(answer, f"patching ConfigMap {name}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClusterError(f"patching ConfigMap {name}: {_told(error)}") from error

    async def _list(self, name: str) -> tuple[str, dict[str, Any] | None]:
        try:
            async with self._session.get(
                self._config_maps(),
                params={"fieldSelector": f"metadata.name={name}"},
                headers=self._headers(),
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            ) as answer:
                await _check(answer, f"listing ConfigMap {name}")
                listed = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ClusterError(f"listing ConfigMap {name}: {_told(error)}") from error
        items = listed.get("items") or []
        return listed["metadata"]["resourceVersion"], items[0] if items else None

    async def _watch(self, name: str, version: str) -> AsyncIterator[dict[str, Any] | None]:
        params = {
            "fieldSelector": f"metadata.name={name}",
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        timeout = aiohttp.ClientTimeout(total=WATCH_SECONDS + REQUEST_SECONDS, sock_connect=REQUEST_SECONDS)
        try:
            async with self._session.get(
                self._config_maps(), params=params, headers=self._headers(), timeout=timeout
            ) as answer:
                await _check(answer, f"watching ConfigMap {name}")
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        # 410 Gone and its kin: what was missed is found by listing again.
                        log.info("the watch of ConfigMap %s ended: %s", name, event["object"].get("message"))
                        return
                    if event["type"] != "BOOKMARK":
                        yield None if event["type"] == "DELETED" else event["object"]
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ClusterError(_told(error)) from error

    def _config_maps(self) -> str:
        return f"{self._server}/api/v1/namespaces/{self.namespace}/configmaps"

    def _headers(self) -> dict[str, str]:
        # Read each time: the kubelet renews the file long before the token expires.
        try:
            token = self._token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ClusterError(f"the ServiceAccount's token cannot be read: {error}") from error
        return {"Authorization": f"Bearer {token}", "User-Agent": "trimtab-agent"}


async def _check(answer: aiohttp.ClientResponse, what: str) -> None:
    if answer.status >= 300:
        text = (await answer.text())[:300]
        raise ClusterError(f"{what}: HTTP {answer.status}: {text}", answer.status)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _pause(failures: int) -> float:
    seconds = min(LONGEST_PAUSE, 0.2 * 2.0**failures)
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
