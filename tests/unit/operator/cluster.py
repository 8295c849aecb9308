"""A Reader of what a test put there, which notes what it is asked for."""

from __future__ import annotations

from trimtab_operator.kube import Objects
from trimtab_operator.plan import Object


class Cluster:
    """Objects of one namespace."""

    def __init__(self, *objects: Object) -> None:
        """The objects, each with its kind."""
        self.objects = objects
        self.asked: list[str] = []

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        self.asked.append(f"{kind} {name}")
        return next((each for each in self._of(kind) if each["metadata"]["name"] == name), None)

    async def metadata(self, kind: str, namespace: str | None, labels: str = "") -> Objects:
        return [{"metadata": each["metadata"]} for each in await self.list(kind, namespace, labels)]

    async def list(self, kind: str, namespace: str | None, labels: str = "", fields: str = "") -> Objects:
        self.asked.append(f"{kind}s")
        wanted = dict(term.split("=") for term in labels.split(",") if term)
        return [each for each in self._of(kind) if wanted.items() <= (each["metadata"].get("labels") or {}).items()]

    def _of(self, kind: str) -> Objects:
        return [each for each in self.objects if each["kind"] == kind]
