"""What the pod is, as probes, proxy and report see it: one place where the parts are read together."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_api.conditions import Reason
from trimtab_api.contract import AgentReport
from trimtab_server.agent.adapters import Adapters
from trimtab_server.agent.base import BaseModel
from trimtab_server.agent.desired import Desired
from trimtab_server.agent.engine import Engine, Life
from trimtab_server.agent.table import Table


@dataclass
class State:
    """The parts, and the two facts that belong to none of them."""

    desired: Desired
    base: BaseModel
    engine: Engine
    table: Table
    adapters: Adapters
    opened: int = 0
    """The start of the engine for which everything wanted was in or had definitely failed."""
    draining: bool = False
    """The pod is about to go: no new clients, please."""
    drained_generation: int = 0
    """The start of the engine that the drain was for."""

    def observe(self) -> None:
        """Take note of what happened since: call after every change."""
        if self.engine.answers and self.adapters.settled:
            self.opened = self.engine.generation
        if self.draining and self.engine.generation > self.drained_generation > 0:
            # The engine was restarted by its liveness probe, whose preStop hook drained us: the pod lives on.
            self.draining = False

    @property
    def serving(self) -> bool:
        """Whether the base answers now."""
        return self.base.served is not None and self.engine.answers

    @property
    def ready(self) -> bool:
        """Whether clients shall be sent here. Adapters are waited for once per start of the engine."""
        return self.serving and not self.draining and self.opened == self.engine.generation

    def explain(self) -> tuple[Reason, str]:
        """Why the pod is as it is."""
        if self.base.served is None:
            return self._explain_base()
        if self.engine.life is Life.HUNG:
            return Reason.ENGINE_FAILED, "the engine takes connections and answers none; it is about to be restarted"
        if self.engine.life is Life.STRANGE:
            return Reason.ENGINE_FAILED, f"the engine does not serve {self.base.served.engine_name}; delete the pod"
        if not self.engine.answers and self.engine.generation:
            return Reason.ENGINE_FAILED, "the engine ended and has not come back yet; see the log of container engine"
        if not self.engine.answers:
            return Reason.STARTING, "the engine is loading the model; its log tells more when this lasts"
        if not self.ready:
            return Reason.STARTING, "draining" if self.draining else "adapters are being loaded"
        return Reason.SERVING, self.desired.complaint[:1024]

    def _explain_base(self) -> tuple[Reason, str]:
        if self.base.failure is not None:
            return self.base.failure.reason, self.base.failure.message[:1024]
        if self.desired.now is None:
            return Reason.STARTING, self.desired.complaint[:1024]
        return Reason.STARTING, f"the model is being fetched{self.base.progress}"

    def report(self, pod_uid: str) -> AgentReport:
        """What the operator is told."""
        reason, message = self.explain()
        return AgentReport(
            pod_uid=pod_uid,
            model_ready=self.serving,
            model_digest=self.base.served.digest if self.base.served else None,
            reason=reason,
            message=message,
            adapters=self.adapters.reports()[:64],
            engine_started=self.engine.started.strftime("%Y-%m-%dT%H:%M:%SZ") if self.engine.started else None,
        )
