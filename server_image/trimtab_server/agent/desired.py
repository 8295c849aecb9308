"""What shall be served: the newest sound ServeConfig, from the desired ConfigMap or from a plain file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from trimtab_api.contract import SERVE_KEY, ServeConfig
from trimtab_server.agent.cluster import Cluster

log = logging.getLogger("trimtab.agent.desired")

FILE_SECONDS = 0.5
"""Pause between looks at a plain file."""


class Desired:
    """The newest sound configuration, and a way to wait for the next."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.now: ServeConfig | None = None
        """The newest; None before the first."""
        self.complaint = "the desired configuration has not been read yet"
        """Why there is none, or why the newest text is passed over; empty when all is well."""
        self._on_change = on_change
        self._changed = asyncio.Event()

    def offer(self, text: str | None, where: str) -> None:
        """Take a new text. One that does not parse is passed over: what is served stays served."""
        if text is None:
            self._complain(f"{where} does not exist or has no {SERVE_KEY}; the operator writes it")
            return
        try:
            config = ServeConfig.read(json.loads(text))
        except (ValidationError, ValueError) as error:
            self._complain(f"{where} is passed over: {SERVE_KEY} does not parse: {error}")
            return
        self.complaint = ""
        if config == self.now:
            return
        log.info("to be served: %s", ", ".join([config.model.name, *(each.name for each in config.adapters)]))
        self.now = config
        self._notify()

    async def first(self) -> ServeConfig:
        """The newest configuration; waits for the first."""
        while self.now is None:
            await self._changed.wait()
        return self.now

    async def changed_within(self, seen: ServeConfig, seconds: float) -> None:
        """Wait until the configuration is another than `seen`, or for so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.now is seen:
                    await self._changed.wait()

    def _complain(self, complaint: str) -> None:
        if complaint != self.complaint:
            log.warning("%s", complaint)
            self.complaint = complaint
            self._on_change()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change()


async def follow_config_map(desired: Desired, cluster: Cluster, name: str) -> None:
    """Follow the ConfigMap for ever."""
    where = f"ConfigMap {cluster.namespace}/{name}"
    async for config_map in cluster.follow_config_map(name):
        desired.offer((config_map or {}).get("data", {}).get(SERVE_KEY), where)


async def follow_file(desired: Desired, file: Path) -> None:
    """Follow a plain file for ever, for tests and for trying things out without a cluster."""
    while True:
        try:
            text: str | None = await asyncio.to_thread(file.read_text, encoding="utf-8")
        except FileNotFoundError:
            text = None
        desired.offer(text, f"file {file}")
        await asyncio.sleep(FILE_SECONDS)
