"""The live table: what `kubectl get` would show, of all three kinds at once, redrawn as it changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from demo.cluster import Cluster, DemoError

KINDS = "finetunejobs.trimtab.dev,mergejobs.trimtab.dev,modeldeployments.trimtab.dev"
LEADING = {"FineTuneJob": "Succeeded", "MergeJob": "Succeeded", "ModelDeployment": "Ready"}


@dataclass(frozen=True)
class Row:
    """One resource as it stands."""

    kind: str
    name: str
    status: str
    reason: str
    step: str
    loss: str
    eta: str
    message: str

    @property
    def done(self) -> bool:
        """It is what was asked for."""
        return self.status == "True"

    @property
    def failed(self) -> bool:
        """It ended otherwise and will not go on by itself."""
        return self.status == "False" and self.kind != "ModelDeployment"


def row(resource: Mapping[str, Any]) -> Row:
    """Read one resource."""
    status = resource.get("status", {})
    leading = LEADING[resource["kind"]]
    condition: Mapping[str, str] = next((c for c in status.get("conditions", []) if c["type"] == leading), {})
    progress = status.get("progress") or {}
    loss = progress.get("loss")
    return Row(
        kind=resource["kind"],
        name=resource["metadata"]["name"],
        status=condition.get("status", "Unknown"),
        reason=condition.get("reason", ""),
        step=progress.get("steps") or progress.get("shards") or status.get("adaptersReady") or "",
        loss="" if loss is None else f"{loss:.3f}",
        eta=progress.get("eta") or "",
        message=condition.get("message", ""),
    )


def draw(rows: Sequence[Row], elapsed: float) -> Table:
    """The rows as a table."""
    table = Table(title=f"{elapsed:4.0f} s", title_justify="left", box=None, pad_edge=False)
    for heading in ("KIND", "NAME", "STATE", "STEP", "LOSS", "ETA", ""):
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for each in rows:
        colour = "green" if each.done else "red" if each.failed else "yellow"
        text = "" if each.done else each.message
        table.add_row(each.kind, each.name, f"[{colour}]{each.reason}[/]", each.step, each.loss, each.eta, text)
    return table


def watch(cluster: Cluster, namespace: str, seconds: float, finished: Callable[[Sequence[Row]], bool]) -> list[Row]:
    """Show the table until finished(rows), a resource fails, or the time is up.

    Raises DemoError when a resource failed or the time is up, naming the command that shows why.
    """
    console = Console()
    started = time.monotonic()
    printed = ""
    rows: list[Row] = []
    with Live(console=console, refresh_per_second=2, transient=False) as live:
        while time.monotonic() - started < seconds:
            rows = [row(item) for item in cluster.get(KINDS, "-n", namespace)["items"]]
            table = draw(rows, time.monotonic() - started)
            if console.is_terminal:
                live.update(table)
            elif (now := " ".join(f"{r.name}:{r.reason}" for r in rows)) != printed:
                printed = now
                console.print(table)
            if failed := [each for each in rows if each.failed]:
                raise DemoError(
                    f"{failed[0].kind} {failed[0].name}: {failed[0].reason}: {failed[0].message}\n"
                    f"See: kubectl -n {namespace} describe {failed[0].kind} {failed[0].name}"
                )
            if finished(rows):
                return rows
            time.sleep(0.5)  # the pace of the picture, not a wait for a result
    late = [each.name for each in rows if not each.done]
    raise DemoError(f"not ready after {seconds:.0f} s: {', '.join(late)}\nSee: kubectl -n {namespace} describe {KINDS}")
