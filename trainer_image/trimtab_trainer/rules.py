"""The API server's own rules, for runs that never meet an API server: the same CEL text, evaluated here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

import cel
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trimtab_api.schema import RULES_KEY


def broken(spec: BaseModel) -> Iterator[tuple[str, str]]:
    """Path below `spec` and sentence of each rule that does not hold, outermost first.

    Rules that compare with an object's former state (`oldSelf`) are passed over: here nothing was before.
    """
    yield from _walk(spec, "")


def _walk(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, BaseModel):
        extra = type(node).model_config.get("json_schema_extra")
        yield from _judge(extra, _given(node.model_dump(mode="json", by_alias=True, exclude_none=True)), path)
        for name, field in type(node).model_fields.items():
            value = getattr(node, name)
            if value is None:
                continue
            inner = f"{path}.{field.alias or name}"
            for below in _extras(field):
                yield from _judge(below, value, inner)
            yield from _walk(value, inner)
    elif isinstance(node, list):
        for index, each in enumerate(node):
            yield from _walk(each, f"{path}[{index}]")


def _extras(field: FieldInfo) -> Iterator[Any]:
    """What a field carries for the generator: its own, and that of the type within an optional one."""
    yield field.json_schema_extra
    for part in get_args(field.annotation):
        yield from (each.json_schema_extra for each in get_args(part)[1:] if isinstance(each, FieldInfo))


def _given(value: Any) -> Any:
    """The value without empty lists: the API server knows them as absent, since no list has a default there."""
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items() if each != []}
    return [_given(each) for each in value] if isinstance(value, list) else value


def _judge(extra: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(extra, dict):
        return
    for rule in extra.get(RULES_KEY, []):
        if "oldSelf" in rule["rule"]:
            continue
        if not _program(rule["rule"]).execute(cel.Context({"self": value}, _EXTENSIONS)):
            yield f"{path}{rule.get('fieldPath', '')}".removeprefix("."), rule["message"]


_EXTENSIONS = {"split": lambda text, separator: text.split(separator)}
"""What Kubernetes adds to the language, as far as our rules use it."""


@lru_cache(maxsize=512)
def _program(text: str) -> Any:
    return cel.compile(text)
