"""What a look at a resource with children under fixed names gives: the plain data that its plan decides on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from trimtab_api.v1alpha1 import MergeJob, ModelDeployment
from trimtab_operator.plan import Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producers

R = TypeVar("R", bound=MergeJob | ModelDeployment)


@dataclass(frozen=True)
class Snapshot(Generic[R]):
    """What is there. Objects are as the API server sent them."""

    resource: R
    settings: Settings
    producers: Producers = field(default_factory=dict)
    """The resources that it refers to."""
    children: Mapping[tuple[str, str], Object] = field(default_factory=dict)
    """What stands under the names of its children, by kind and name."""
    pods: tuple[Object, ...] = ()
    """Its pods, oldest first."""
    warnings: tuple[Object, ...] = ()
    """Warning events about what does not run."""

    def child(self, kind: str, name: str) -> Object | None:
        """The child of this kind and name, if it is ours."""
        found = self.children.get((kind, name))
        owners = found["metadata"].get("ownerReferences") or [] if found else []
        return found if any(owner["uid"] == self.resource.metadata.uid for owner in owners) else None
