"""The agent's own figures, in a registry of their own so that the engine's can follow them in one answer."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

REQUESTS = Counter(
    "trimtab_agent_requests",
    "Requests answered, by the name asked for and the status.",
    ["model", "code"],
    registry=REGISTRY,
)
FIRST_BYTE = Histogram(
    "trimtab_agent_first_byte_seconds",
    "Seconds from a request's last byte to the first byte of its answer.",
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
RUNNING = Gauge("trimtab_agent_running_requests", "Requests being answered.", registry=REGISTRY)
READY = Gauge("trimtab_agent_ready", "1 when clients shall be sent to this pod.", registry=REGISTRY)
ENGINE_STARTS = Gauge("trimtab_agent_engine_starts", "Starts of the engine seen.", registry=REGISTRY)
ADAPTERS = Gauge("trimtab_agent_adapters", "Adapters wanted, by reason.", ["reason"], registry=REGISTRY)
LOADS = Histogram(
    "trimtab_agent_adapter_load_seconds",
    "Seconds that the engine took to load an adapter.",
    registry=REGISTRY,
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
