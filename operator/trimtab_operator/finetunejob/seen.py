"""What a look at a FineTuneJob gives: the plain data that plan decides on."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab_api.contract import ProgressReport
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.progress import Attempt
from trimtab_operator.finetunejob import gang
from trimtab_operator.plan import Child, Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producers


@dataclass(frozen=True)
class Seen:
    """What is there. Lists hold objects as the API server sent them."""

    job: FineTuneJob
    settings: Settings
    producers: Producers = field(default_factory=dict)
    preflight: Object | None = None
    preflight_pods: tuple[Object, ...] = ()
    gang: Object | None = None
    """The PyTorchJob of the open attempt."""
    pods: tuple[Object, ...] = ()
    """Trainer pods of the open attempt."""
    leavings: tuple[Object, ...] = ()
    """Trainer pods of closed attempts, and of a predecessor of the same name."""
    missing: frozenset[Child] = frozenset()
    """What an attempt that was made needs, was looked for, and does not stand."""
    report: ProgressReport | None = None
    needless: tuple[Object, ...] = ()
    """While the open attempt is made: the preflight, and the attempt before the last one. The last one stays, so that
    its pods' logs can be read."""
    events: tuple[Object, ...] = ()
    """Warning events of the namespace, read only while something does not run."""

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that has no end yet."""
        status = self.job.status
        newest = status.attempts[-1] if status and status.attempts else None
        return newest if newest is not None and newest.end_time is None else None

    @property
    def members(self) -> tuple[Object, ...]:
        """The pods by which the open attempt is judged."""
        return tuple(pod for pod in self.pods if not gang.evicted(pod, self.gang))

    @property
    def evicted(self) -> tuple[Object, ...]:
        """Those whose place the queue took away."""
        return tuple(pod for pod in self.pods if gang.evicted(pod, self.gang))

    @property
    def last(self) -> Attempt | None:
        """The newest attempt, ended or not."""
        status = self.job.status
        return status.attempts[-1] if status and status.attempts else None


def finished(job: FineTuneJob) -> bool:
    """The leading condition has left Unknown for good."""
    return job.status is not None and job.status.completion_time is not None
