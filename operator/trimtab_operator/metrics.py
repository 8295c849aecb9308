"""The operator's figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

QUEUE_DEPTH = Gauge("trimtab_queue_depth", "Keys that are due and not being looked at.", registry=REGISTRY)
QUEUE_OLDEST = Gauge("trimtab_queue_oldest_seconds", "Age of the oldest due key.", registry=REGISTRY)
RECONCILE_SECONDS = Histogram(
    "trimtab_reconcile_seconds",
    "Duration of one look at one resource.",
    ("kind", "result"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
JOBS = Gauge(
    "trimtab_resources", "Resources by the reason of their leading condition.", ("kind", "state"), registry=REGISTRY
)
EVENTS_DROPPED = Counter("trimtab_events_dropped_total", "Events that the API server did not take.", registry=REGISTRY)


class States:
    """Counts resources by state, moving each one from its old state to its new one."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, str, str], str] = {}

    def seen(self, kind: str, namespace: str, name: str, state: str | None) -> None:
        """The resource is in this state now; None when it is gone."""
        key = (kind, namespace, name)
        before = self._states.get(key)
        if before == state:
            return
        if before is not None:
            JOBS.labels(kind, before).dec()
        if state is None:
            self._states.pop(key, None)
            return
        self._states[key] = state
        JOBS.labels(kind, state).inc()
