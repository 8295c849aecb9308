"""The small vocabulary in which the kinds are written, so that one declaration serves people, Python and the server.

A model's docstrings become `kubectl explain`, its bounds become the schema, its rules become CEL. Nothing here
knows how a CustomResourceDefinition is laid out: that is the generator's duty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

RULES_KEY = "x-kubernetes-validations"


class Model(BaseModel):
    """Base of every noun: camelCase outside, snake_case inside, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Parse an object as a (possibly newer) API server sent it: fields unknown to this version are passed over.

        Raises pydantic.ValidationError when a known field has a wrong type.
        """
        return cls.model_validate(document, extra="ignore")

    def dump(self) -> dict[str, Any]:
        """The object as JSON types under its public names, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Rule:
    """One CEL rule: what must hold, the sentence a user reads when it does not, and the field it is about."""

    cel: str
    message: str
    field_path: str | None = None
    optional_old_self: bool = False
    """True for a rule that looks at `oldSelf` and must run on create as well (oldSelf is then an optional)."""

    def document(self) -> dict[str, Any]:
        """The rule as the API server wants it."""
        written: dict[str, Any] = {"rule": self.cel, "message": self.message}
        if self.field_path is not None:
            written["fieldPath"] = self.field_path
        if self.optional_old_self:
            written["optionalOldSelf"] = True
        return written


def rules(*each: Rule, **extra: Any) -> dict[str, Any]:
    """The json_schema_extra that carries these rules (and any other `x-kubernetes-*` key) to the generator."""
    return {RULES_KEY: [rule.document() for rule in each], **extra}


def fixed_once_started(field: str) -> Rule:
    """A rule on an object's root: this field of spec does not change once status has a start time."""
    same = (
        f"(has(self.spec.{field}) == has(oldSelf.spec.{field}) && "
        f"(!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field}))"
    )
    return Rule(
        f"!(has(oldSelf.status) && has(oldSelf.status.startTime)) || {same}",
        "may not change once the job has started: delete the job, or apply it under another name",
        field_path=f".spec.{field}",
    )


def list_map(*keys: str) -> dict[str, Any]:
    """json_schema_extra of a list whose items are told apart by these required keys."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


LIST_SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}
"""json_schema_extra of a list of distinct scalars."""

LIST_ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
"""json_schema_extra of a list that is replaced as a whole."""


class OneOf(Model):
    """A union in the Kubernetes style: several optional members of which exactly one is given."""

    members: ClassVar[tuple[str, ...]] = ()
    """Public names of the union's members; every other field is common to all of them."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Add the rule "exactly one" to the generated schema."""
        schema: dict[str, Any] = handler(core_schema)
        target = handler.resolve_ref_schema(schema)
        present = ", ".join(f"has(self.{cel_name(name)})" for name in cls.members)
        rule = Rule(f"[{present}].filter(given, given).size() == 1", cls.sentence())
        target[RULES_KEY] = [rule.document(), *target.get(RULES_KEY, [])]
        return schema

    @classmethod
    def sentence(cls) -> str:
        """What a user reads who gave none or several."""
        return f"give exactly one of {', '.join(cls.members)}"

    @property
    def given(self) -> str:
        """The public name of the member that is set."""
        return next(name for name in self.members if self._member(name) is not None)

    def _member(self, public_name: str) -> Any:
        for name, field in type(self).model_fields.items():
            if (field.alias or name) == public_name:
                return getattr(self, name)
        raise AttributeError(public_name)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(self._member(name) is not None for name in self.members) != 1:
            raise ValueError(self.sentence())
        return self


_CEL_RESERVED = {
    "namespace",
    "for",
    "in",
    "if",
    "else",
    "return",
    "true",
    "false",
    "null",
    "package",
    "import",
}


def cel_name(public_name: str) -> str:
    """A property's name as CEL in a CustomResourceDefinition spells it (reserved words are wrapped)."""
    return f"__{public_name}__" if public_name in _CEL_RESERVED else public_name


class Column(Model):
    """One column of `kubectl get`."""

    name: str
    """Heading."""
    type: Literal["integer", "number", "string", "boolean", "date"]
    """How the value is printed."""
    json_path: str
    """Where the value stands in the object."""
    description: str
    """What the column tells."""
    priority: int = 0
    """0 is always shown, 1 with `-o wide`."""


@dataclass(frozen=True)
class Scale:
    """Where the scale subresource finds its three values."""

    spec_replicas: str
    status_replicas: str
    label_selector: str


@dataclass(frozen=True)
class Resource:
    """Everything about a kind that its model cannot say: names, columns, subresources."""

    kind: str
    plural: str
    short_names: tuple[str, ...]
    model: type[Model]
    columns: tuple[Column, ...]
    scale: Scale | None = None

    @property
    def singular(self) -> str:
        """The kind in small letters."""
        return self.kind.lower()


class ObjectMeta(Model):
    """The part of an object's metadata that Trimtab reads."""

    model_config = ConfigDict(extra="ignore")

    name: str
    """Name within the namespace."""
    namespace: str = "default"
    """Namespace of the object."""
    uid: str = ""
    """Unique for all time; empty before the server has seen the object."""
    generation: int = 0
    """Counts the changes of spec."""
    resource_version: str = ""
    """Counts every change; a precondition of status writes."""
    creation_timestamp: str | None = None
    """When the object was created, RFC 3339."""
    deletion_timestamp: str | None = None
    """When deletion was asked for, RFC 3339; absent while the object is to live."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the object."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the object."""
