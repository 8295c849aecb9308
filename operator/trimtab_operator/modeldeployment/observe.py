"""One snapshot of a ModelDeployment: itself, what it refers to, what was made for it, and what its pods say."""

from __future__ import annotations

from trimtab_api import names
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_operator import lookup
from trimtab_operator.kube import Reader
from trimtab_operator.modeldeployment.plan import Seen
from trimtab_operator.modeldeployment.status import is_ready
from trimtab_operator.plan import Child, Gone, Key, Object
from trimtab_operator.settings import Settings
from trimtab_operator.sources import referenced

CHILDREN = ("ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "Service", "PodDisruptionBudget", "Deployment")


async def observe(settings: Settings, reader: Reader, key: Key) -> tuple[Object, Seen] | Gone:
    """The snapshot, or that the resource is gone."""
    document = await reader.get(key.kind, key.namespace, key.name)
    if document is None:
        return Gone()
    deployment = ModelDeployment.read(document)
    sources = [deployment.spec.model.from_, *(adapter.from_ for adapter in deployment.spec.adapters)]
    references = [reference for source in sources if (reference := referenced(source)) is not None]
    producers = await lookup.producers(reader, key.namespace, references)
    children = await lookup.children(reader, key.namespace, _children(key.name))
    started = ("Deployment", names.server(key.name)) in children
    pods = await lookup.pods(reader, key.namespace, deployment.metadata.uid) if started else ()
    waiting = [pod["metadata"]["uid"] for pod in pods if not is_ready(pod)]
    return document, Seen(
        resource=deployment,
        settings=settings,
        producers=producers,
        children=children,
        pods=pods,
        warnings=await lookup.warnings(reader, key.namespace, waiting),
    )


def _children(name: str) -> list[Child]:
    config_maps = (names.serving_desired(name), names.serving_reports(name))
    return [*((kind, names.server(name)) for kind in CHILDREN), *(("ConfigMap", each) for each in config_maps)]
