"""How a model becomes a structural schema, and what has no such form."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from trimtab_api.schema import LIST_ATOMIC, LIST_SET, RULES_KEY, Model, OneOf, Resource, Rule, list_map, rules
from trimtab_operator.crdgen import NotStructural, Structure, crd

Text = Annotated[str, Field(max_length=8)]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(Model):
    """An inner object."""

    size: int = 3
    """Its size."""


class Strict(Model):
    """An object with a required field."""

    name: Text
    """Its name."""


def field_of(annotation: Any, default: Any = ...) -> dict[str, Any]:
    """The structural form of one field of a model."""
    namespace = {
        "__doc__": "A model.",
        "__annotations__": {"it": Annotated[annotation, Field(description="What it is.")]},
        "__module__": __name__,
        **({} if default is ... else {"it": default}),
    }
    model = type(Model)("Probe", (Model,), namespace)
    schema = model.model_json_schema(by_alias=True)
    body = Structure(schema.pop("$defs", {})).node(schema, "")
    node: dict[str, Any] = body["properties"]["it"]
    assert node.pop("description") == "What it is."
    return node


CONVERTED = {
    "optional": (Text | None, None, {"type": "string", "maxLength": 8}),
    "bounds outside the optional": (
        Annotated[str | None, Field(max_length=8)], None, {"type": "string", "maxLength": 8},
    ),
    "more than": (Annotated[float, Field(gt=0)], ..., {"type": "number", "minimum": 0, "exclusiveMinimum": True}),
    "less than": (Annotated[int, Field(lt=9)], ..., {"type": "integer", "maximum": 9, "exclusiveMaximum": True}),
    "at least, or absent": (Annotated[int, Field(ge=1)] | None, None, {"type": "integer", "minimum": 1}),
    "one word": (Literal["a"], ..., {"type": "string", "enum": ["a"]}),
    "one of some words": (Literal["a", "b"], "a", {"type": "string", "enum": ["a", "b"], "default": "a"}),
    "one of some numbers": (Literal[8, 16] | None, None, {"type": "integer", "enum": [8, 16]}),
    "enum": (Colour, ..., {"type": "string", "enum": ["red", "blue"]}),
    "plain default": (bool, True, {"type": "boolean", "default": True}),
    "list": (
        Annotated[list[Text], Field(max_length=4, json_schema_extra=LIST_SET)], ...,
        {"type": "array", "maxItems": 4, "x-kubernetes-list-type": "set", "items": {"type": "string", "maxLength": 8}},
    ),
    "list that is empty by default": (
        Annotated[list[Text], Field(max_length=4, json_schema_extra=LIST_ATOMIC, default_factory=list)], ...,
        {
            "type": "array", "maxItems": 4, "x-kubernetes-list-type": "atomic",
            "items": {"type": "string", "maxLength": 8},
        },
    ),
    "map": (
        Annotated[dict[str, Text], Field(max_length=4)], ...,
        {"type": "object", "maxProperties": 4, "additionalProperties": {"type": "string", "maxLength": 8}},
    ),
    "quantity": (
        Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True, "maxLength": 8})], ...,
        {"x-kubernetes-int-or-string": True, "maxLength": 8},
    ),
    "anything": (
        Annotated[dict[str, Any] | None, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})], None,
        {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    ),
    "rule": (
        Annotated[str, Field(max_length=8, json_schema_extra=rules(Rule("self != ''", "say something")))], ...,
        {"type": "string", "maxLength": 8, RULES_KEY: [{"rule": "self != ''", "message": "say something"}]},
    ),
    "object with a required field": (
        Strict, ...,
        {
            "type": "object", "required": ["name"],
            "properties": {"name": {"description": "Its name.", "type": "string", "maxLength": 8}},
        },
    ),
    "optional object": (
        Inner | None, None,
        {"type": "object", "properties": {"size": {"description": "Its size.", "type": "integer", "default": 3}}},
    ),
    "object whose fields all have defaults": (
        Annotated[Inner, Field(default_factory=Inner)], ...,
        {
            "type": "object", "default": {},
            "properties": {"size": {"description": "Its size.", "type": "integer", "default": 3}},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_converts(name: str) -> None:
    annotation, default, wanted = CONVERTED[name]
    assert field_of(annotation, default) == wanted


class Node(Model):
    """An object that holds itself."""

    below: Node | None = None
    """Another."""


REFUSED = {
    "string without a bound": (str, ".it: give it max_length"),
    "optional string without a bound": (str | None, ".it: give it max_length"),
    "list without a bound": (Annotated[list[Text], Field(json_schema_extra=LIST_ATOMIC)], ".it: give it max_length"),
    "list without a list type": (Annotated[list[Text], Field(max_length=2)], ".it: give it a list type"),
    "item without a bound": (
        Annotated[list[str], Field(max_length=2, json_schema_extra=LIST_ATOMIC)], ".it[]: give it max_length",
    ),
    "map without a bound": (dict[str, Text], ".it: give it max_length"),
    "value of a map without a bound": (Annotated[dict[str, str], Field(max_length=2)], ".it.*: give it max_length"),
    "anything": (Any, ".it: type None"),
    "two types": (int | bool, ".it: type None"),
    "a union of models": (Inner | Strict, ".it: a union of models"),
    "set": (set[Text], ".it: uniqueItems"),
    "duration": (timedelta, ".it: give it max_length"),
    "decimal": (Decimal, ".it: type None"),
    "pair": (tuple[int, int], ".it: prefixItems"),
    "map by an enum": (Annotated[dict[Colour, int], Field(max_length=2)], ".it: propertyNames"),
    "open map": (Annotated[dict[str, Any], Field(max_length=2)], ".it: additionalProperties"),
    "deprecated": (Annotated[Text, Field(deprecated=True)], ".it: deprecated"),
    "deprecated and optional": (Annotated[Text | None, Field(deprecated=True)], ".it: deprecated"),
    "fraction as an open bound": (Annotated[float, Field(ge=0, lt=0.5)], ".it: the API server misreads"),
    "circle": (Node | None, "Node holds itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_path(name: str) -> None:
    annotation, message = REFUSED[name]
    with pytest.raises(NotStructural) as refusal:
        field_of(annotation)
    assert message in str(refusal.value)


def test_field_without_a_description_is_refused() -> None:
    class Silent(Model):
        """A model."""

        it: int

    schema = Silent.model_json_schema()
    with pytest.raises(NotStructural, match=r"\.it: has no description"):
        Structure({}).node(schema, "")


class Choice(OneOf):
    """One of two."""

    members = ("from", "mergeJob")

    from_: Annotated[Inner | None, Field(alias="from")] = None
    """The first."""
    merge_job: Inner | None = None
    """The second."""


class Item(Model):
    """An item."""

    key: Text
    """What tells it apart."""


class Spec(Model):
    """What is wanted."""

    choice: Choice
    """The choice."""
    items: Annotated[list[Item], Field(max_length=3, json_schema_extra=list_map("key"))] = Field(default_factory=list)
    """The items."""


class Thing(Model):
    """A thing."""

    metadata: Inner
    spec: Spec
    """What is wanted."""
    status: Inner | None = None
    """What is known."""


def test_whole_kind() -> None:
    document = crd(Resource(kind="Thing", plural="things", short_names=("th",), model=Thing, columns=()))
    assert document["metadata"] == {"name": "things.trimtab.dev"}
    assert document["spec"]["names"]["listKind"] == "ThingList"
    (version,) = document["spec"]["versions"]
    assert version["subresources"] == {"status": {}}
    root = version["schema"]["openAPIV3Schema"]
    assert root["required"] == ["spec"]
    assert root["properties"]["metadata"] == {"type": "object", "properties": {"name": {"type": "string"}}}
    (name_rule,) = root[RULES_KEY]
    assert name_rule["optionalOldSelf"] is True
    assert name_rule["rule"].startswith("oldSelf.hasValue() ||")
    choice = root["properties"]["spec"]["properties"]["choice"]
    assert choice[RULES_KEY] == [
        {
            "rule": "[has(self.from), has(self.mergeJob)].filter(given, given).size() == 1",
            "message": "give exactly one of from, mergeJob",
        }
    ]
    assert "default" not in choice["properties"]["from"], "a member of a union never comes by default"
    items = root["properties"]["spec"]["properties"]["items"]
    assert (items["x-kubernetes-list-type"], items["x-kubernetes-list-map-keys"]) == ("map", ["key"])
