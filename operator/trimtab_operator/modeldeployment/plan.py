"""Decides what a ModelDeployment needs next.

Adapters go into the desired ConfigMap and restart nothing. What the pods are made from is written again only when the
spec, the base or a mount changes. Image and room for adapters are decided once, when the pods are first asked for, and
hold until the deployment is scaled to zero: neither an upgrade of the operator nor another adapter rolls an engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

from pydantic import ValidationError

from trimtab_api import names
from trimtab_api.conditions import READY, Reason
from trimtab_api.contract import SERVE_KEY, AgentReport, ModelInput, ServeAdapter, ServeConfig, ServeModel
from trimtab_api.v1alpha1 import FineTuneJob, ModelDeployment
from trimtab_api.v1alpha1.modeldeployment import LoraRank, ModelDeploymentStatus, ResolvedServing, ServedAdapter
from trimtab_api.v1alpha1.source import ModelSource
from trimtab_api.v1alpha1.tuner import Lora
from trimtab_operator.modeldeployment import build
from trimtab_operator.modeldeployment.build import Serving
from trimtab_operator.modeldeployment.status import Fleet, Replica, Wanted, Word, fold, is_ready, trouble_of
from trimtab_operator.plan import Event, Object, Plan, Ref
from trimtab_operator.snapshot import Snapshot
from trimtab_operator.sources import Unmet, model_input, referenced

RANKS: tuple[int, ...] = get_args(LoraRank)
LEAST_RANK = 16
"""Room for adapters whose rank nobody told yet."""
MOST_LORAS = 8
"""Adapters in one batch, unless the user asks for more: each takes memory of the accelerator."""

STARTING_SECONDS = 5.0
"""How often pods that do not answer are looked at: volumes that cannot be mounted are told by events alone."""
WAITING_SECONDS = 60.0


class Seen(Snapshot[ModelDeployment]):
    """The snapshot that observe takes."""

    @property
    def deployment(self) -> ModelDeployment:
        """The ModelDeployment."""
        return self.resource

    @property
    def status(self) -> ModelDeploymentStatus:
        """The status so far."""
        return self.deployment.status or ModelDeploymentStatus()

    @property
    def workload(self) -> Object | None:
        """The Deployment."""
        return self.child("Deployment", names.server(self.deployment.metadata.name))


@dataclass(frozen=True)
class Intent:
    """What shall be served, as far as it can be told now."""

    config: ServeConfig | None
    """None when there is no base to serve, neither a new one nor one from before."""
    adapters: tuple[Wanted, ...]
    obstacle: Word | None = None
    """What keeps us from serving what the spec asks for."""
    following: Word | None = None
    """What is awaited while the version from before is served."""


def plan(seen: Seen, now: datetime) -> Plan:
    """What to do now."""
    if seen.deployment.metadata.deletion_timestamp:
        return Plan()  # children go with their owner
    intent = intend(seen)
    fleet = muster(seen)
    if intent.config is None:
        status = _status(seen, None, fleet, intent, now)
        return Plan(status=status.dump(), events=_said(seen, status), requeue_after=WAITING_SECONDS)
    resolved = resolve(seen, intent.config)
    config = intent.config.model_copy(update={"max_lora_rank": resolved.max_lora_rank})
    serving = Serving(seen.deployment, resolved, config, seen.settings.image_pull_secrets)
    status = _status(seen, resolved, fleet, intent, now)
    return Plan(
        create=missing_reports(seen),
        apply=(*changed(seen, serving), *rolled(seen, serving)),
        status=status.dump(),
        patch=(*scaled(seen, serving), *pruned(seen)),
        delete=needless(seen),
        events=_said(seen, status),
        requeue_after=_next_look(fleet, status),
    )


def hindered(seen: Seen, now: datetime, reason: str, message: str) -> Mapping[str, Any]:
    """The status when an object cannot be made."""
    intent = intend(seen)
    stopped = Intent(None, intent.adapters, Word(Reason(reason), message))
    return _status(seen, seen.status.resolved, muster(seen), stopped, now).dump()


def _status(
    seen: Seen, resolved: ResolvedServing | None, fleet: Fleet, intent: Intent, now: datetime
) -> ModelDeploymentStatus:
    moment = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return fold(seen.deployment, resolved, fleet, intent.adapters, moment, intent.obstacle, intent.following)


# ---------------------------------------------------------------- what shall be served


def intend(seen: Seen) -> Intent:
    """What the spec asks for, followed to the versions that there are now."""
    before = previous(seen)
    adapters, wanted = [], []
    for adapter in seen.deployment.spec.adapters:
        source, word = _adapter(seen, adapter, before)
        if source is not None:
            adapters.append(ServeAdapter(name=adapter.name, source=source))
        digest = source.s3.digest if source and source.s3 else None
        wanted.append(Wanted(adapter.name, digest, word, known=source is not None))
    base, obstacle, following = _base(seen, before)
    if base is None:
        return Intent(None, tuple(wanted), obstacle)
    return Intent(ServeConfig(model=base, adapters=adapters), tuple(wanted), obstacle, following)


def _base(seen: Seen, before: ServeConfig | None) -> tuple[ServeModel | None, Word | None, Word | None]:
    """The base, what is in its way, and what is awaited while the one from before is served."""
    spec = seen.deployment.spec
    name = spec.model.name or seen.deployment.metadata.name
    if any(adapter.name == name for adapter in spec.adapters):
        words = (
            f"spec.adapters names an adapter {name}, which is what the model is called. "
            "Give spec.model.name or the adapter another name."
        )
        return (before.model if before else None), Word(Reason.SPEC_INVALID, words), None
    found = model_input("model.from", spec.model.from_, ("model",), seen.producers, spec.storage, seen.settings.storage)
    if isinstance(found, ModelInput):
        return ServeModel(name=name, source=found), None, None
    word = Word(found.reason, found.message)
    if before is None:
        return None, word, None
    if before.model.source.reference == _reference(spec.model.from_):
        return ServeModel(name=name, source=before.model.source), None, word
    return before.model, word, None


def _adapter(seen: Seen, adapter: ServedAdapter, before: ServeConfig | None) -> tuple[ModelInput | None, Word | None]:
    """Where an adapter is, or was when its job is being run again; and why there is no newer one."""
    spec = seen.deployment.spec
    field_name = f"adapters[{adapter.name}].from"
    found = model_input(
        field_name, adapter.from_, ("adapter",), seen.producers, spec.storage, seen.settings.storage, task="CAUSAL_LM"
    )
    if not isinstance(found, Unmet):
        return found, None
    kept = next((each.source for each in (before.adapters if before else []) if each.name == adapter.name), None)
    same = kept is not None and kept.reference == _reference(adapter.from_)
    return (kept if same else None), Word(found.reason, found.message)


def _reference(source: ModelSource) -> str | None:
    reference = referenced(source)
    return reference.logical if reference else None


def previous(seen: Seen) -> ServeConfig | None:
    """What the agents were last asked to serve."""
    found = seen.child("ConfigMap", names.serving_desired(seen.deployment.metadata.name)) or {}
    try:
        return ServeConfig.read(json.loads(found["data"][SERVE_KEY]))
    except (KeyError, ValueError, ValidationError):
        return None


# ---------------------------------------------------------------- what is decided once


def resolve(seen: Seen, config: ServeConfig) -> ResolvedServing:
    """What is left to us: kept from the start where the user does not say, but for the base, which is followed."""
    engine = seen.deployment.spec.engine
    kept = seen.status.resolved if _started(seen) else None
    count = len(seen.deployment.spec.adapters)
    rank = engine.max_lora_rank or (kept.max_lora_rank if kept else derived_rank(seen))
    loras = _room(rank, engine.max_loras, kept.max_loras if kept else 0, min(MOST_LORAS, max(2, count)))
    host = max(2 * loras, kept.max_cpu_loras if kept else count + 8) if rank else 0
    source = config.model.source
    return ResolvedServing(
        image=_image(seen, kept),
        model_name=config.model.name,
        model_uri=source.s3.uri if source.s3 else source.reference,
        model_digest=source.s3.digest if source.s3 else None,
        max_lora_rank=rank,
        max_loras=loras,
        max_cpu_loras=host,
    )


def _room(rank: int, asked: int | None, kept: int, derived: int) -> int:
    return (asked or kept or derived) if rank else 0


def _started(seen: Seen) -> bool:
    """Pods stand or shall stand: what was decided for them holds."""
    return seen.workload is not None and bool(seen.pods or seen.workload["spec"].get("replicas"))


def _image(seen: Seen, kept: ResolvedServing | None) -> str:
    """The image that the pods were started with, unless no node could ever pull it."""
    leading = next((each for each in seen.status.conditions if each.type == READY), None)
    unavailable = leading is not None and leading.reason == Reason.IMAGE_UNAVAILABLE
    return kept.image if kept and kept.image and not unavailable else seen.settings.images.server


def derived_rank(seen: Seen) -> int:
    """Room for the highest rank that is known now, at least 16; none when there is no adapter."""
    if not seen.deployment.spec.adapters:
        return 0
    known = [rank for adapter in seen.deployment.spec.adapters if (rank := _rank(seen, adapter)) is not None]
    highest = max([LEAST_RANK, *known])
    return next((rank for rank in RANKS if rank >= highest), RANKS[-1])


def _rank(seen: Seen, adapter: ServedAdapter) -> int | None:
    """An adapter's rank: what its job made, else what that job shall make."""
    reference = referenced(adapter.from_)
    producer = seen.producers.get(reference) if reference else None
    if not isinstance(producer, FineTuneJob):
        return None
    artifact = producer.status.artifact if producer.status else None
    if artifact is not None and artifact.rank is not None:
        return artifact.rank
    lora = producer.spec.tuner.lora or Lora()
    return None if producer.spec.tuner.type == "full" else lora.rank


# ---------------------------------------------------------------- effects


def missing_reports(seen: Seen) -> tuple[Object, ...]:
    """The ConfigMap of the agents' reports, once."""
    made = build.reports(seen.deployment)
    return () if seen.child("ConfigMap", made["metadata"]["name"]) else (made,)


def changed(seen: Seen, serving: Serving) -> tuple[Object, ...]:
    """Every object but the Deployment that is missing, somebody else's, or not as it shall be."""
    return tuple(
        each for each in build.objects(serving) if not _stands(each, seen.child(each["kind"], each["metadata"]["name"]))
    )


def _stands(wanted: Any, present: Any) -> bool:
    """Everything that is wanted is there; what the server or others added is no difference."""
    if isinstance(wanted, dict):
        return isinstance(present, dict) and all(_stands(value, present.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(present, list) or len(present) != len(wanted):
            return False
        return all(_stands(value, there) for value, there in zip(wanted, present, strict=True))
    return bool(wanted == present)


def rolled(seen: Seen, serving: Serving) -> tuple[Object, ...]:
    """The Deployment, when it is missing or its pods are made from something else."""
    present = seen.workload
    annotations = (present["metadata"].get("annotations") or {}) if present else {}
    return () if annotations.get(names.SPEC_HASH) == serving.hash else (build.deployment(serving),)


def scaled(seen: Seen, serving: Serving) -> tuple[tuple[Ref, Mapping[str, Any]], ...]:
    """Another number of pods, when nothing else of the Deployment changes."""
    wanted = seen.deployment.spec.replicas
    if seen.workload is None or rolled(seen, serving) or seen.workload["spec"].get("replicas") == wanted:
        return ()
    return ((_ref(seen.workload, "Deployment"), {"spec": {"replicas": wanted}}),)


def pruned(seen: Seen) -> tuple[tuple[Ref, Mapping[str, Any]], ...]:
    """Take out the reports of pods that are gone: killed ones cannot do it themselves."""
    found = seen.child("ConfigMap", names.serving_reports(seen.deployment.metadata.name))
    if found is None:
        return ()
    living = {pod["metadata"]["name"] for pod in seen.pods}
    gone = sorted(set(found.get("data") or {}) - living)
    return ((_ref(found, "ConfigMap"), {"data": dict.fromkeys(gone)}),) if gone else ()


def needless(seen: Seen) -> tuple[Ref, ...]:
    """A disruption budget for a single pod would only hold up whoever drains its node."""
    spec = seen.deployment.spec
    server = names.server(seen.deployment.metadata.name)
    unwanted = [
        *(["PodDisruptionBudget"] if spec.replicas <= 1 else []),
        *(["ServiceAccount"] if spec.pod.service_account_name else []),
    ]
    found = [(kind, seen.child(kind, server)) for kind in unwanted]
    return tuple(_ref(child, kind) for kind, child in found if child is not None)


def _ref(child: Object, kind: str) -> Ref:
    meta = child["metadata"]
    return Ref(kind, meta["namespace"], meta["name"], meta["uid"])


# ---------------------------------------------------------------- what the pods say


def muster(seen: Seen) -> Fleet:
    """The pods, what their agents say, and how far the Deployment is with them."""
    name = names.serving_reports(seen.deployment.metadata.name)
    said = (seen.child("ConfigMap", name) or {}).get("data") or {}
    living = [pod for pod in seen.pods if not pod["metadata"].get("deletionTimestamp")]
    replicas = tuple(_replica(pod, said.get(pod["metadata"]["name"]), seen.warnings) for pod in living)
    workload = seen.workload or {}
    state = workload.get("status") or {}
    return Fleet(
        wanted=seen.deployment.spec.replicas,
        present=len(replicas),
        ready=sum(replica.ready for replica in replicas),
        rolled_out=_rolled_out(workload),
        refused=next((c.get("message", "") for c in state.get("conditions") or [] if _is_refusal(c)), ""),
        replicas=replicas,
    )


def _rolled_out(workload: Object) -> bool:
    state = workload.get("status") or {}
    caught_up: bool = state.get("observedGeneration", 0) >= workload.get("metadata", {}).get("generation", 1)
    wanted = workload.get("spec", {}).get("replicas", 1)
    return caught_up and state.get("updatedReplicas", 0) == state.get("replicas", 0) == wanted


def _is_refusal(condition: Mapping[str, Any]) -> bool:
    return condition.get("type") == "ReplicaFailure" and condition.get("status") == "True"


def _replica(pod: Object, text: str | None, warnings: tuple[Object, ...]) -> Replica:
    meta = pod["metadata"]
    report = _report(text)
    believed = report is not None and report.pod_uid == meta["uid"]
    return Replica(
        name=meta["name"],
        uid=meta["uid"],
        ready=is_ready(pod),
        report=report if believed else None,
        trouble=trouble_of(pod, warnings),
    )


def _report(text: str | None) -> AgentReport | None:
    """What an agent wrote, if it fits the contract."""
    try:
        return AgentReport.read(json.loads(text or ""))
    except (ValueError, TypeError, ValidationError):
        return None


def _next_look(fleet: Fleet, status: ModelDeploymentStatus) -> float | None:
    if fleet.ready < fleet.wanted:
        return STARTING_SECONDS
    waiting = any(adapter.reason == Reason.WAITING for adapter in status.adapters)
    return WAITING_SECONDS if waiting else None


def _said(seen: Seen, status: ModelDeploymentStatus) -> tuple[Event, ...]:
    """An event for each new reason, so that `kubectl describe` tells the story."""
    before = next((each for each in seen.status.conditions if each.type == READY), None)
    after = next(each for each in status.conditions if each.type == READY)
    if before is not None and before.reason == after.reason:
        return ()
    return (Event("Warning" if after.status == "False" else "Normal", after.reason, after.message),)
