"""Every Kubernetes name, label and selector that Trimtab derives, in one place.

A child's name is its owner's name with a suffix that tells the kind, so that a FineTuneJob, a MergeJob and a
ModelDeployment of one name never meet. The longest is `<job>-999-worker-998`, which fits a label's 63 characters
because names of our kinds end at 48.
"""

from __future__ import annotations

GROUP = "trimtab.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "trimtab"

NAME_LIMIT = 48
"""Longest metadata.name of our kinds, in characters."""

ATTEMPT_LIMIT = 999
"""Highest attempt number, so that names stay within their limit."""

EVIDENCE_FINALIZER = f"{GROUP}/evidence"
"""Keeps an ended trainer pod until its ending is written into status."""

# Labels
OWNER_KIND = f"{GROUP}/kind"
OWNER_NAME = f"{GROUP}/name"
OWNER_UID = f"{GROUP}/uid"
ATTEMPT = f"{GROUP}/attempt"
ROLE = f"{GROUP}/role"
"""What a pod is for: trainer, preflight, merge or server."""
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY_VALUE = "trimtab"
QUEUE = "kueue.x-k8s.io/queue-name"
"""Kueue's queue label, passed through from a FineTuneJob to its PyTorchJobs."""

# Annotations
SPEC_HASH = f"{GROUP}/spec-hash"
"""Hash of the inputs that a preflight looked at; another hash asks for another preflight."""


def pytorchjob(job: str, attempt: int) -> str:
    """The PyTorchJob of one attempt."""
    return f"{job}-{attempt}"


def run_config(job: str, attempt: int) -> str:
    """The ConfigMap with run.json of one attempt."""
    return f"{job}-{attempt}-run"


def progress(job: str) -> str:
    """The ConfigMap that rank 0 writes its progress into."""
    return f"{job}-progress"


def preflight(job: str) -> str:
    """The Job (and its ConfigMap) that looks at a FineTuneJob's inputs."""
    return f"{job}-preflight"


def trainer_account(job: str) -> str:
    """ServiceAccount, Role and RoleBinding of a FineTuneJob's master pod."""
    return f"{job}-trainer"


def merge(name: str) -> str:
    """The Job of a MergeJob, the ConfigMap with its merge.json, ServiceAccount, Role and RoleBinding."""
    return f"{name}-merge"


def merge_report(name: str) -> str:
    """The ConfigMap that a merge pod writes its progress into."""
    return f"{name}-merge-report"


def server(name: str) -> str:
    """Deployment, Service, ServiceAccount, Role and RoleBinding of a ModelDeployment."""
    return f"{name}-server"


def serving_desired(name: str) -> str:
    """The ConfigMap in which a ModelDeployment's agents read what to serve."""
    return f"{name}-desired"


def serving_reports(name: str) -> str:
    """The ConfigMap into which each agent writes what its engine serves, one key per pod."""
    return f"{name}-reports"


def labels(kind: str, name: str, uid: str, role: str | None = None, attempt: int | None = None) -> dict[str, str]:
    """The labels of a child: whose it is, what it is for, and of which attempt."""
    derived = {MANAGED_BY: MANAGED_BY_VALUE, OWNER_KIND: kind, OWNER_NAME: name, OWNER_UID: uid}
    if role is not None:
        derived[ROLE] = role
    if attempt is not None:
        derived[ATTEMPT] = str(attempt)
    return derived


def children_of(uid: str) -> str:
    """The selector of everything that belongs to one of our objects."""
    return f"{OWNER_UID}={uid}"


def pods_of_name(kind: str, name: str) -> str:
    """The selector of every pod that belongs to one of our objects, or to a predecessor of its name."""
    return f"{OWNER_KIND}={kind},{OWNER_NAME}={name}"


CHILDREN = f"{MANAGED_BY}={MANAGED_BY_VALUE}"
"""The selector of everything that Trimtab made: what the operator watches."""


def tracker_volume(tracker: str) -> str:
    """The volume with the keys of an experiment tracker."""
    return f"tracker-{tracker}"
