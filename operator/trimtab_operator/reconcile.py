"""One look at one resource, the same for every kind: observe, plan, then the effects in their one order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from trimtab_operator.kube import Kube, KubeError, NameConflict, Reader, Refused
from trimtab_operator.metrics import EVENTS_DROPPED
from trimtab_operator.plan import Event, Gone, Key, Object, Plan
from trimtab_operator.survey import NotHeld, Survey

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")
Clock = Callable[[], datetime]


def utc() -> datetime:
    """The time of day."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Kind(Generic[Seen]):
    """What reconcile needs to know of a kind: how to look, how to decide, and what to say of a refusal."""

    name: str
    observe: Callable[[Reader, Key], Awaitable[tuple[Object, Seen] | Gone]]
    """One snapshot: the resource as it was read, and what the plan looks at."""
    plan: Callable[[Seen, datetime], Plan]
    """The decision. Pure."""
    hindered: Callable[[Seen, datetime, str, str], Mapping[str, Any]]
    """The status when an object cannot be made: seen, now, reason, message. Pure."""


@dataclass(frozen=True)
class Rest:
    """Nothing is to be done for a resource now."""

    requeue_after: float | None = None
    """Seconds until that may have changed by itself."""


async def rests(kind: Kind[Any], key: Key, survey: Survey, clock: Clock = utc) -> Rest | None:
    """Whether a survey shows that there is nothing to do; None when only a look of its own can tell, or act.

    Nothing is written on the word of a survey, which may be stale: what changes after it is told by the watches.
    """
    try:
        observed = await kind.observe(survey, key)
    except NotHeld:
        return None
    if isinstance(observed, Gone):
        return None if observed.leavings else Rest()
    resource, seen = observed
    plan = kind.plan(seen, clock())
    return None if plan.changes(resource) else Rest(plan.requeue_after)


async def reconcile(kind: Kind[Any], key: Key, kube: Kube, clock: Clock = utc) -> float | None:
    """Bring the world one step nearer to what the resource asks for; the seconds until the next look, if any.

    Raises KubeError for what a later look may mend; the queue waits longer each time.
    """
    observed = await kind.observe(kube, key)
    if isinstance(observed, Gone):
        for pod in observed.leavings:
            await kube.release(pod)
        return None
    resource, seen = observed
    now = clock()
    plan = kind.plan(seen, now)
    try:
        await make(kube, plan)
    except (NameConflict, Refused) as error:
        reason = "NameConflict" if isinstance(error, NameConflict) else "PodsRefused"
        await write(kube, resource, kind.hindered(seen, now, reason, str(error)))
        raise
    if plan.status is not None:
        await write(kube, resource, plan.status)
    for pod in plan.release:
        await kube.release(pod)
    for ref, patch in plan.patch:
        await kube.merge(ref, patch)
    for ref in plan.delete:
        await kube.delete(ref)
    for event in plan.events:
        await emit(kube, resource, event, now)
    return plan.requeue_after


async def make(kube: Kube, plan: Plan) -> None:
    """Make what shall exist: what is read by others before them."""
    for made in plan.apply:
        await kube.apply(made)
    for made in plan.create:
        await kube.create(made)


async def write(kube: Kube, resource: Object, status: Mapping[str, Any]) -> None:
    """Write the status if it says anything new."""
    if dict(status) != (resource.get("status") or {}):
        await kube.write_status(resource, status)


async def emit(kube: Kube, resource: Object, event: Event, now: datetime) -> None:
    """Write an event. One that is lost is only counted: events are for eyes, status is for machines."""
    said = f"{resource['metadata']['uid']}/{event.reason}/{event.message}"
    name = f"{resource['metadata']['name']}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    try:
        await kube.emit(resource, event, now.strftime("%Y-%m-%dT%H:%M:%SZ"), name)
    except KubeError as error:
        EVENTS_DROPPED.inc()
        log.warning("event %s not written: %s", event.reason, error)
