"""What goes through a real API server comes back as it was: numbers, defaults, specs, and every status we can write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab_api.conditions import Reason
from trimtab_api.schema import Model, Resource
from trimtab_api.v1alpha1 import RESOURCES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
API = "trimtab.dev/v1alpha1"
HUB = {"huggingFace": {"repo": "acme/tiny"}}
MINIMAL: dict[str, dict[str, Any]] = {
    "FineTuneJob": {"method": "sft", "model": {"from": HUB}, "dataset": {"train": [{"from": {"inline": "{}"}}]}},
    "MergeJob": {"adapters": [{"from": HUB}]},
    "ModelDeployment": {"model": {"from": HUB}, "adapters": [{"name": "a", "from": HUB}]},
}


def body(kind: str, spec: dict[str, Any], name: str = "trip") -> dict[str, Any]:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec}


def each_kind() -> Any:
    return pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)


# ------------------------------------------------------------------------------------------ numbers

RATES = (1e-4, 2e-5, 3e-06, 0.00015, 1.0, 5e-324, 0.1 + 0.2, math.nextafter(1, 0), 1e-300)


@pytest.mark.parametrize("rate", RATES, ids=repr)
def test_number_survives(api: Any, namespace: str, rate: float) -> None:
    made = api.create(
        namespace, "finetunejobs", body("FineTuneJob", {**MINIMAL["FineTuneJob"], "training": {"learningRate": rate}})
    )
    assert made.accepted, made.message
    assert api.read(namespace, "finetunejobs", "trip").body["spec"]["training"]["learningRate"] == rate


@pytest.mark.parametrize("typed", ["1e-4", "2e-5", "3e-06", "0.00015", "1", "1E-4", ".5"])
def test_number_as_a_person_types_it_survives(kubectl: Any, api: Any, namespace: str, typed: str) -> None:
    """Unquoted in YAML, through kubectl."""
    text = yaml.safe_dump(body("FineTuneJob", MINIMAL["FineTuneJob"])) + f"  training:\n    learningRate: {typed}\n"
    kubectl("apply", "--namespace", namespace, "-f", "-", stdin=text)
    assert api.read(namespace, "finetunejobs", "trip").body["spec"]["training"]["learningRate"] == float(typed)


# ----------------------------------------------------------------------------------------- defaults


@each_kind()
def test_defaults_of_the_server_are_those_of_the_model(api: Any, namespace: str, resource: Resource) -> None:
    """Two sources of one default drift; here they are compared for every field, given or not."""
    spec = MINIMAL[resource.kind]
    made = api.create(namespace, resource.plural, body(resource.kind, spec))
    assert made.accepted, made.message
    seen = resource.model.read(api.read(namespace, resource.plural, "trip").body)
    ours = resource.model.model_validate(body(resource.kind, spec))
    assert seen.spec == ours.spec  # type: ignore[attr-defined]


@each_kind()
def test_server_shows_every_default(api: Any, namespace: str, resource: Resource) -> None:
    """`kubectl get -o yaml` tells what will run: only what is absent or an empty collection is left out."""
    made = api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind]))
    ours = resource.model.model_validate(body(resource.kind, MINIMAL[resource.kind])).dump()["spec"]
    assert without_empty(made.body["spec"]) == without_empty(ours)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        pruned = {key: without_empty(each) for key, each in value.items()}
        return {key: each for key, each in pruned.items() if each not in ({}, [])}
    return [without_empty(each) for each in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------ examples

DOCUMENTS = [
    (str(file.relative_to(EXAMPLES)), document)
    for file in sorted(EXAMPLES.rglob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]


@pytest.mark.parametrize(
    ("file", "document"), DOCUMENTS, ids=[f"{file}-{doc['metadata']['name']}" for file, doc in DOCUMENTS]
)
def test_example_comes_back_as_it_was(api: Any, namespace: str, file: str, document: dict[str, Any]) -> None:
    resource = next(each for each in RESOURCES if each.kind == document["kind"])
    ours = resource.model.model_validate(document)
    sent = ours.model_dump(mode="json", by_alias=True, exclude_unset=True)
    made = api.create(namespace, resource.plural, {**body(resource.kind, sent["spec"], document["metadata"]["name"])})
    assert made.accepted, made.message
    seen = resource.model.read(api.read(namespace, resource.plural, document["metadata"]["name"]).body)
    assert seen.spec == ours.spec  # type: ignore[attr-defined]


def test_whole_spec_with_its_defaults_is_accepted_again(api: Any, namespace: str) -> None:
    """What `kubectl get -o yaml` prints can be applied under another name."""
    for resource in RESOURCES:
        assert api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind])).accepted
        spec = api.read(namespace, resource.plural, "trip").body["spec"]
        again = api.create(namespace, resource.plural, body(resource.kind, spec, "again"))
        assert again.accepted, again.message


# ------------------------------------------------------------------------------------------ statuses

DIGEST = "sha256:" + "0" * 64
TEXTS = {r"^sha256:[0-9a-f]{64}$": DIGEST, r"^[A-Za-z][A-Za-z0-9]*$": "Running"}


class Filler:
    """Makes values of a JSON schema as pydantic tells it: as much of everything as the model allows, or as little."""

    def __init__(self, definitions: dict[str, Any], *, most: bool) -> None:
        self.definitions = definitions
        self.most = most

    def value(self, node: dict[str, Any], turn: int = 0) -> Any:
        if "$ref" in node:
            return self.value(self.definitions[node["$ref"].removeprefix("#/$defs/")], turn)
        if "anyOf" in node:
            return self.value(node["anyOf"][0], turn)
        if "const" in node or "enum" in node:
            choices = node.get("enum", [node.get("const")])
            return choices[-1 if self.most else 0]
        made: Any = getattr(self, node["type"])(node, turn)
        return made

    def object(self, node: dict[str, Any], turn: int) -> dict[str, Any]:
        if "properties" not in node:
            below = node["additionalProperties"]
            return {f"key/{n}": self.value(below, n) for n in range(node["maxProperties"] if self.most else 0)}
        wanted = node["properties"] if self.most else node.get("required", [])
        return {name: self.value(node["properties"][name], turn) for name in wanted}

    def array(self, node: dict[str, Any], turn: int) -> list[Any]:
        return [self.value(node["items"], index) for index in range(node["maxItems"] if self.most else 0)]

    def string(self, node: dict[str, Any], turn: int) -> str:
        if node.get("format") == "date-time":
            return "2026-01-01T00:00:00Z"
        if "pattern" in node:
            return TEXTS[node["pattern"]] if node["maxLength"] > 64 else f"{TEXTS[node['pattern']]}{turn}"
        length = node["maxLength"] if self.most else node.get("minLength", 0)
        return f"{turn:03d}".ljust(length, "é")[:length]

    def integer(self, node: dict[str, Any], turn: int) -> int:
        if self.most:
            return int(node.get("maximum", 2**53)) - turn
        return int(node.get("minimum", 0)) + turn

    def number(self, node: dict[str, Any], turn: int) -> float:
        return 1.7976931348623157e308 if self.most else float(node.get("minimum", -1e-300))

    def boolean(self, node: dict[str, Any], turn: int) -> bool:
        return self.most


def status_model(resource: Resource) -> type[Model]:
    annotation = resource.model.model_fields["status"].annotation
    return next(part for part in annotation.__args__ if part is not type(None))  # type: ignore[union-attr]


def filled(resource: Resource, *, most: bool) -> Model:
    model = status_model(resource)
    schema = model.model_json_schema(by_alias=True)
    return model.model_validate(Filler(schema.pop("$defs", {}), most=most).value(schema))


def written(api: Any, namespace: str, resource: Resource, status: Model) -> Model:
    """Write a status as the operator does, by PUT, and read it back."""
    present = api.read(namespace, resource.plural, "trip").body
    path = f"/apis/{API}/namespaces/{namespace}/{resource.plural}/trip/status"
    answer = api.request("PUT", path, {**present, "status": status.dump()}, fieldValidation="Strict")
    assert answer.accepted, answer.message[:2000]
    seen = resource.model.read(api.read(namespace, resource.plural, "trip").body)
    return seen.status  # type: ignore[attr-defined,no-any-return]


@each_kind()
@pytest.mark.parametrize("most", [True, False], ids=["most", "least"])
def test_every_status_is_accepted_and_comes_back(api: Any, namespace: str, resource: Resource, most: bool) -> None:
    """A status that the server refuses would leave a job silent for ever."""
    assert api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind])).accepted
    status = filled(resource, most=most)
    assert written(api, namespace, resource, status) == status


@each_kind()
def test_status_can_shrink_and_grow(api: Any, namespace: str, resource: Resource) -> None:
    assert api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind])).accepted
    least, most = filled(resource, most=False), filled(resource, most=True)
    for status in (least, most, least):
        assert written(api, namespace, resource, status) == status


@each_kind()
def test_every_word_is_a_reason(api: Any, namespace: str, resource: Resource) -> None:
    assert api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind])).accepted
    words = [*Reason]
    for some in batches(words, 16):
        conditions = [
            {"type": f"T{index}", "status": "Unknown", "reason": word, "lastTransitionTime": "2026-01-01T00:00:00Z"}
            for index, word in enumerate(some)
        ]
        answer = api.patch(
            namespace, resource.plural, "trip", {"status": {"conditions": conditions}}, subresource="status"
        )
        assert answer.accepted, answer.message


def batches(words: list[Reason], size: int) -> Iterator[list[Reason]]:
    iterator = iter(words)
    while some := list(itertools.islice(iterator, size)):
        yield some


@each_kind()
def test_spec_cannot_be_written_through_status_nor_status_through_spec(
    api: Any, namespace: str, resource: Resource
) -> None:
    assert api.create(namespace, resource.plural, body(resource.kind, MINIMAL[resource.kind])).accepted
    before = api.read(namespace, resource.plural, "trip").body
    change = {"spec": {"storage": {"region": "eu-central-1"}}}
    assert api.patch(namespace, resource.plural, "trip", change, subresource="status").accepted
    assert api.patch(namespace, resource.plural, "trip", {"status": {"observedGeneration": 7}}).accepted
    after = api.read(namespace, resource.plural, "trip").body
    assert after["spec"] == before["spec"]
    assert "status" not in after
    assert after["metadata"]["generation"] == 1
