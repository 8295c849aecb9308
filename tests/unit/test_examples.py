"""examples/every-field holds every field: what no example shows, no test applies."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab_api.schema import Model, Resource
from trimtab_api.v1alpha1 import RESOURCES

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENTS = [document for file in EXAMPLES.rglob("*.yaml") for document in yaml.safe_load_all(file.read_text())]


def model_of(document: dict[str, Any]) -> type[Model]:
    return next(resource.model for resource in RESOURCES if resource.kind == document["kind"])


def models_in(annotation: Any) -> Iterator[type[Model]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        yield annotation
    elif typing.get_origin(annotation) in (list, types.UnionType, typing.Union, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from models_in(part)


def fields(model: type[Model]) -> set[tuple[str, str]]:
    """Every (model, field) that can be reached from a model."""
    found: set[tuple[str, str]] = set()
    left, seen = [model], {model}
    while left:
        present = left.pop()
        for name, field in present.model_fields.items():
            found.add((present.__name__, field.alias or name))
            left += [inner for inner in models_in(field.annotation) if inner not in seen]
            seen.update(models_in(field.annotation))
    return found


def shown(value: Any) -> Iterator[tuple[str, str]]:
    """Every (model, field) that a document sets."""
    if isinstance(value, list):
        for item in value:
            yield from shown(item)
    if isinstance(value, Model):
        for name in value.model_fields_set:
            yield type(value).__name__, type(value).model_fields[name].alias or name
            yield from shown(getattr(value, name))


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.kind)
def test_every_field_is_shown(resource: Resource) -> None:
    spec = resource.model.model_fields["spec"].annotation
    assert isinstance(spec, type)
    seen = {pair for document in DOCUMENTS for pair in shown(model_of(document).model_validate(document))}
    assert sorted(fields(spec) - seen) == []


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: f"{document['kind']}/{document['metadata']['name']}"
)
def test_every_example_is_read_by_its_model(document: dict[str, Any]) -> None:
    model_of(document).model_validate(document)
