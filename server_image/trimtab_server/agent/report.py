"""Tells the operator what this pod serves: one key of the reports ConfigMap, on change, at most once a second."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trimtab_api.contract import AgentReport
from trimtab_server.agent.cluster import Cluster, ClusterError

log = logging.getLogger("trimtab.agent.report")

SHORTEST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
SIZE_LIMIT = 10_240
"""Longest report, in bytes: a hundred pods must fit into one ConfigMap."""


class Sink(Protocol):
    """Where reports go."""

    async def put(self, text: str | None) -> None:
        """Replace the report; None removes it. Raises ClusterError."""


class ConfigMapSink:
    """One key of a ConfigMap."""

    def __init__(self, cluster: Cluster, config_map: str, key: str) -> None:
        self._cluster = cluster
        self._config_map = config_map
        self._key = key

    async def put(self, text: str | None) -> None:
        """Replace the report; None removes it. Raises ClusterError."""
        await self._cluster.patch_config_map(self._config_map, {self._key: text})


class FileSink:
    """A plain file, for tests and for trying things out without a cluster."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def put(self, text: str | None) -> None:
        """Replace the report; None removes it."""
        if text is None:
            self._file.unlink(missing_ok=True)
            return
        draft = self._file.with_name(f".{self._file.name}.draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._file)


class Reporter:
    """Brings each new report to the sink, however long that takes, and never an old one after a newer."""

    def __init__(self, sink: Sink, current: Callable[[], AgentReport]) -> None:
        self._sink = sink
        self._current = current
        self._written: str | None = None
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Report for ever."""
        failures = 0
        while True:
            self._changed.clear()
            try:
                await self._tell()
                failures = 0
            except ClusterError as error:
                failures += 1
                log.warning("%s; it is told again later", error)
                self._changed.set()
            await asyncio.sleep(min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0**failures))
            await self._changed.wait()

    async def withdraw(self) -> None:
        """Remove the report: the pod goes. What cannot be removed now, the operator removes."""
        try:
            await self._sink.put(None)
        except ClusterError as error:
            log.warning("the report stays: %s", error)

    async def _tell(self) -> None:
        text = bounded(self._current())
        if text != self._written:
            await self._sink.put(text)
            self._written = text


def bounded(report: AgentReport) -> str:
    """The report as JSON of at most SIZE_LIMIT bytes; the adapters' messages give way."""
    for limit in (1024, 256, 64, 0):
        adapters = [each.model_copy(update={"message": each.message[:limit]}) for each in report.adapters]
        shortened = report.model_copy(update={"adapters": adapters, "message": report.message[: max(limit, 256)]})
        text = json.dumps(shortened.dump(), ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) <= SIZE_LIMIT:
            break
    return text
