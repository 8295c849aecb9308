"""`python -m trimtab_server.agent`: reads its place from arguments and the downward API, and runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trimtab_api.contract import AGENT_PORT, ENGINE_PORT, METRICS_PORT, WORK_ROOT
from trimtab_server.agent.cluster import ClusterError
from trimtab_server.agent.program import Settings, run
from trimtab_server.drain import DRAIN_PORT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s %(message)s")
    try:
        asyncio.run(run(read_settings(arguments)))
    except ClusterError as error:
        logging.getLogger("trimtab.agent").error("%s", error)
        return 64
    return 0


def read_settings(arguments: Sequence[str] | None) -> Settings:
    """The settings from flags and environment. Exits with a usage error when one is missing."""
    flags = argparse.ArgumentParser(prog="trimtab_server.agent", description="Serves a base and its adapters.")
    desired = flags.add_mutually_exclusive_group(required=True)
    desired.add_argument("--desired-config-map", help="ConfigMap with serve.json")
    desired.add_argument("--desired-file", type=Path, help="file with the same text, to run without a cluster")
    reports = flags.add_mutually_exclusive_group(required=True)
    reports.add_argument("--reports-config-map", help="ConfigMap to report into, under the pod's name")
    reports.add_argument("--report-file", type=Path, help="file to report into, to run without a cluster")
    flags.add_argument("--work", type=Path, default=Path(WORK_ROOT), help="writable folder, shared with the engine")
    flags.add_argument("--host", default="0.0.0.0", help="address to serve on")  # noqa: S104 - a pod's own
    flags.add_argument("--port", type=int, default=AGENT_PORT, help="port for clients and probes")
    flags.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="port for Prometheus")
    flags.add_argument("--drain-port", type=int, default=DRAIN_PORT, help="port on 127.0.0.1 for the preStop hook")
    flags.add_argument("--engine-url", default=f"http://127.0.0.1:{ENGINE_PORT}", help="where the engine listens")
    given = flags.parse_args(arguments)
    return Settings(
        pod_name=os.environ.get("POD_NAME", "local"),
        pod_uid=os.environ.get("POD_UID", "local"),
        desired_config_map=given.desired_config_map,
        reports_config_map=given.reports_config_map,
        desired_file=given.desired_file,
        report_file=given.report_file,
        work=given.work,
        handoff=given.work / "engine" / "handoff.json",
        host=given.host,
        port=given.port,
        metrics_port=given.metrics_port,
        drain_port=given.drain_port,
        engine_url=given.engine_url,
    )


if __name__ == "__main__":
    sys.exit(main())
