"""Folds what the Deployment, its pods and their agents say into conditions, per-adapter lines and the URL.

Agents are believed about their own engine alone, only while their pod exists, and no further than the bounds of the
report. What is wanted is in the spec; what is served is what the engines answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab_api import names
from trimtab_api.conditions import DEGRADED, PROGRESSING, READY, Reason
from trimtab_api.contract import AgentAdapter, AgentReport
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_api.v1alpha1.modeldeployment import AdapterStatus, ModelDeploymentStatus, ResolvedServing
from trimtab_api.v1alpha1.status import MESSAGE_LIMIT, Condition
from trimtab_operator import trouble
from trimtab_operator.modeldeployment.build import AGENT, ENGINE, selector

State = Literal["True", "False", "Unknown"]

ON_THE_WAY = frozenset({Reason.WAITING, Reason.LOADING, Reason.STARTING, Reason.PENDING, Reason.SERVING})
"""What passes by itself; every other reason of a pod or an adapter wants somebody's hand."""


@dataclass(frozen=True)
class Word:
    """A reason and its sentence."""

    reason: Reason
    message: str = ""

    @property
    def wanting(self) -> bool:
        """It wants somebody's hand."""
        return self.reason not in ON_THE_WAY


@dataclass(frozen=True)
class Replica:
    """One pod, and what its agent says when there is reason to believe it."""

    name: str
    uid: str
    ready: bool
    report: AgentReport | None = None
    trouble: Word | None = None
    """What the kubelet or the scheduler says against it."""


@dataclass(frozen=True)
class Fleet:
    """The pods and how far their Deployment is with them."""

    wanted: int
    present: int = 0
    ready: int = 0
    rolled_out: bool = False
    """Every pod is made from the template of now."""
    refused: str = ""
    """Why the API server refuses to make pods, in its words."""
    replicas: tuple[Replica, ...] = ()

    @property
    def reports(self) -> list[AgentReport]:
        """What the agents say."""
        return [replica.report for replica in self.replicas if replica.report is not None]


@dataclass(frozen=True)
class Wanted:
    """One adapter as it is asked for now."""

    name: str
    digest: str | None = None
    """The version to serve; None takes what stands there."""
    unmet: Word | None = None
    """Why its source cannot be opened."""
    known: bool = True
    """The agents are asked for it: if `unmet` is given as well, for the version from before."""


def fold(
    deployment: ModelDeployment,
    resolved: ResolvedServing | None,
    fleet: Fleet,
    adapters: Sequence[Wanted],
    now: str,
    obstacle: Word | None = None,
    following: Word | None = None,
) -> ModelDeploymentStatus:
    """The status of a deployment; `now` is RFC 3339.

    `obstacle` is what keeps the operator from serving what the spec asks for, `following` what it awaits while it
    serves the version from before.
    """
    old = deployment.status or ModelDeploymentStatus()
    lines = [adapter_status(adapter, fleet, resolved) for adapter in adapters]
    leading = verdict(old, fleet, lines, obstacle)
    conditions = [
        _condition(deployment, READY, *leading, now),
        _condition(deployment, PROGRESSING, *progressing(fleet, lines, obstacle or following), now),
        _condition(deployment, DEGRADED, *degraded(fleet, leading), now),
    ]
    return ModelDeploymentStatus(
        observed_generation=deployment.metadata.generation,
        conditions=conditions,
        start_time=old.start_time or (now if resolved is not None else None),
        replicas=fleet.present,
        ready_replicas=fleet.ready,
        ready=f"{fleet.ready}/{fleet.wanted}",
        selector=",".join(f"{key}={value}" for key, value in sorted(selector(deployment).items())),
        url=url(deployment) if resolved is not None else None,
        adapters=lines,
        adapters_ready=adapters_ready(fleet, lines),
        resolved=resolved,
    )


def url(deployment: ModelDeployment) -> str:
    """What an OpenAI client inside the cluster takes as its base URL."""
    metadata = deployment.metadata
    return f"http://{names.server(metadata.name)}.{metadata.namespace}.svc/v1"


# ---------------------------------------------------------------- pods


def is_ready(pod: Mapping[str, Any]) -> bool:
    """The Service sends requests to the pod."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)


def trouble_of(pod: Mapping[str, Any], warnings: Iterable[Mapping[str, Any]]) -> Word | None:
    """What the kubelet or the scheduler says against a pod."""
    found = trouble.of_pod(pod, warnings)
    return Word(found.reason, found.message) if found else _crashing(pod)


def _crashing(pod: Mapping[str, Any]) -> Word | None:
    status = pod.get("status", {})
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        if container.get("state", {}).get("waiting", {}).get("reason") != "CrashLoopBackOff":
            continue
        last = container.get("lastState", {}).get("terminated", {})
        name, which = pod["metadata"]["name"], "the agent" if container.get("name") == AGENT else f"the {ENGINE}"
        words = " ".join(str(last.get("message", "")).split())[-600:]
        return Word(
            Reason.ENGINE_FAILED,
            f"pod {name}: {which} ends again and again, last with code {last.get('exitCode')}: {words} "
            f"Read its log: kubectl logs {name} -c {container.get('name')} --previous",
        )
    return None


# ---------------------------------------------------------------- adapters


def adapter_status(adapter: Wanted, fleet: Fleet, resolved: ResolvedServing | None) -> AdapterStatus:
    """One adapter over all pods: the worst word of any pod, the digest that most of them serve."""
    said = [line for report in fleet.reports for line in report.adapters if line.name == adapter.name]
    served = [line.digest for line in said if line.digest is not None]
    word = adapter.unmet or _loading(adapter, said, fleet, resolved)
    return AdapterStatus(
        name=adapter.name,
        digest=max(sorted(set(served)), key=served.count) if served else None,
        ready_replicas=len(served),
        reason=word.reason,
        message=word.message[:MESSAGE_LIMIT],
    )


def _loading(adapter: Wanted, said: Sequence[AgentAdapter], fleet: Fleet, resolved: ResolvedServing | None) -> Word:
    if resolved is not None and resolved.max_lora_rank == 0:
        return Word(
            Reason.ADAPTER_RANK_TOO_LARGE,
            "the engine was started without room for adapters. Set spec.engine.maxLoraRank to at least the adapter's "
            "rank; the pods are then replaced.",
        )
    wrong = [line for line in said if line.reason not in ON_THE_WAY and line.reason is not Reason.LOADED]
    if wrong:
        return Word(wrong[0].reason, wrong[0].message)
    current = [line for line in said if _is_current(line, adapter)]
    if not said:
        return Word(Reason.LOADING, "no pod has spoken of it yet")
    if len(current) == len(said):
        return Word(Reason.LOADED)
    return Word(Reason.LOADING, f"{len(current)} of {len(said)} pods serve the version that is wanted")


def _is_current(line: AgentAdapter, adapter: Wanted) -> bool:
    return line.reason is Reason.LOADED and adapter.digest in (None, line.digest)


def adapters_ready(fleet: Fleet, lines: Sequence[AdapterStatus]) -> str:
    """Adapters that every ready pod serves, of all: 2/2."""
    return f"{sum(_served(fleet, line) for line in lines)}/{len(lines)}"


def _served(fleet: Fleet, line: AdapterStatus) -> bool:
    return fleet.ready > 0 and line.ready_replicas >= fleet.ready


# ---------------------------------------------------------------- conditions


def verdict(
    old: ModelDeploymentStatus, fleet: Fleet, lines: Sequence[AdapterStatus], obstacle: Word | None
) -> tuple[State, Word]:
    """Ready: True when all that was asked for answers, False when somebody has to act, Unknown on the way."""
    if obstacle is not None:
        return ("False" if obstacle.wanting else "Unknown"), obstacle
    if fleet.wanted == 0:
        return "False", Word(Reason.SCALED_TO_ZERO, "spec.replicas is 0. Raise it to serve.")
    if fleet.ready < fleet.wanted:
        return _incomplete(old, fleet)
    return _adapters_verdict(fleet, lines)


def _incomplete(old: ModelDeploymentStatus, fleet: Fleet) -> tuple[State, Word]:
    trouble = pods_trouble(fleet)
    if trouble is not None and trouble.wanting:
        return "False", trouble
    message = trouble.message if trouble else "the pods fetch the model and start their engine"
    if fleet.ready == 0 and not _has_served(old):
        return "Unknown", Word(Reason.STARTING, message)
    return "False", Word(Reason.REPLICAS_UNAVAILABLE, f"{fleet.ready} of {fleet.wanted} pods answer: {message}")


def pods_trouble(fleet: Fleet) -> Word | None:
    """What is said against the pods that do not answer: what wants a hand first."""
    if fleet.refused:
        return Word(
            Reason.PODS_REFUSED,
            f"the API server refuses the pods: {fleet.refused[:1024]} Do what the refusal asks for.",
        )
    words = [word for replica in fleet.replicas if not replica.ready for word in _words(replica)]
    return min(words, key=lambda word: not word.wanting, default=None)


def _words(replica: Replica) -> list[Word]:
    said = [replica.trouble] if replica.trouble else []
    if replica.report is not None:
        said.append(Word(replica.report.reason, f"pod {replica.name}: {replica.report.message}"))
    return said


def _has_served(old: ModelDeploymentStatus) -> bool:
    ready = next((each for each in old.conditions if each.type == READY), None)
    lost = (Reason.REPLICAS_UNAVAILABLE, Reason.ENGINE_FAILED, Reason.ADAPTERS_FAILED)
    return old.ready_replicas > 0 or (ready is not None and (ready.status == "True" or ready.reason in lost))


def _adapters_verdict(fleet: Fleet, lines: Sequence[AdapterStatus]) -> tuple[State, Word]:
    failed = [line for line in lines if Reason(line.reason) not in ON_THE_WAY and line.reason != Reason.LOADED]
    if failed:
        return "False", Word(
            Reason.ADAPTERS_FAILED, _list("the base is served, without ", failed, "; see status.adapters")
        )
    missing = [line for line in lines if not _served(fleet, line)]
    if missing:
        first = missing[0]
        return "Unknown", Word(
            Reason(first.reason) if first.reason in (Reason.WAITING, Reason.LOADING) else Reason.LOADING,
            _list("the base is served; still to come: ", missing),
        )
    return "True", Word(Reason.SERVING, f"{fleet.ready} of {fleet.wanted} pods answer, with every adapter")


def _list(headline: str, lines: Sequence[AdapterStatus], end: str = "") -> str:
    shown = "; ".join(f"{line.name} ({line.reason}: {line.message[:300]})" for line in lines[:4])
    more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{headline}{shown}{more}{end}"


def progressing(fleet: Fleet, lines: Sequence[AdapterStatus], obstacle: Word | None) -> tuple[State, Word]:
    """Whether something asked for is not there yet and comes by itself."""
    if obstacle is not None:
        return ("False" if obstacle.wanting else "True"), obstacle
    if not fleet.rolled_out or fleet.ready < fleet.wanted:
        return "True", Word(Reason.STARTING, f"{fleet.ready} of {fleet.wanted} pods answer")
    coming = [line for line in lines if line.reason in (Reason.WAITING, Reason.LOADING)]
    if coming:
        return "True", Word(Reason(coming[0].reason), _list("still to come: ", coming))
    return "False", Word(Reason.SERVING if fleet.wanted else Reason.SCALED_TO_ZERO)


def degraded(fleet: Fleet, leading: tuple[State, Word]) -> tuple[State, Word]:
    """Whether it serves, but not all that was asked for."""
    state, word = leading
    serves_less = fleet.ready > 0 and state == "False"
    return ("True", word) if serves_less else ("False", Word(word.reason))


def _condition(deployment: ModelDeployment, kind: str, state: State, word: Word, now: str) -> Condition:
    old = next(
        (each for each in (deployment.status.conditions if deployment.status else []) if each.type == kind), None
    )
    kept = old is not None and old.status == state
    return Condition(
        type=kind,
        status=state,
        reason=word.reason,
        message=word.message[:MESSAGE_LIMIT],
        last_transition_time=old.last_transition_time if old is not None and kept else now,
        observed_generation=deployment.metadata.generation,
    )
