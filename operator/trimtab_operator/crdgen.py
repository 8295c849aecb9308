"""Writes crds/, the chart's copy and the reference from the models of trimtab_api, so that nobody edits them by hand.

pydantic's JSON schema says more than a structural schema may. Each node is therefore first brought into the form that
the API server knows, and then held against a whitelist: what has no structural form is refused with its path, never
dropped in silence. Run as `python -m trimtab_operator.crdgen`, with --check to compare only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab_api.names import GROUP, NAME_LIMIT, VERSION
from trimtab_api.schema import RULES_KEY, Resource, Rule
from trimtab_api.v1alpha1 import RESOURCES
from trimtab_operator import docgen

ROOT = Path(__file__).resolve().parents[2]
CRD_FOLDER = Path("crds")
CHART_FOLDER = Path("helm/trimtab/templates/crds")

Node = dict[str, Any]

ANY_TYPE = frozenset({"type", "description", "default", "enum", "nullable", RULES_KEY})
BY_TYPE = {
    "string": frozenset({"format", "pattern", "minLength", "maxLength"}),
    "integer": frozenset({"format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "boolean": frozenset[str](),
    "array": frozenset({"items", "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"}),
    "object": frozenset(
        {
            "properties",
            "required",
            "additionalProperties",
            "minProperties",
            "maxProperties",
            "x-kubernetes-map-type",
            "x-kubernetes-preserve-unknown-fields",
        }
    ),
}
INT_OR_STRING = frozenset({"x-kubernetes-int-or-string", "pattern", "maxLength", "minimum"})

NAME_RULE = Rule(
    f"oldSelf.hasValue() || (self.metadata.name.size() <= {NAME_LIMIT} && "
    "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$'))",
    f"must have at most {NAME_LIMIT} characters: small letters, digits and '-', beginning with a letter "
    "and ending with a letter or digit; no dots. Names of pods are derived from it",
    field_path=".metadata.name",
    optional_old_self=True,
)
"""Runs on create alone, so that it can never refuse a status write or the deletion of an older object."""


class NotStructural(ValueError):
    """A model says something that a CustomResourceDefinition cannot; the message begins with the field's path."""


def crd(resource: Resource) -> Node:
    """The CustomResourceDefinition of a kind. Raises NotStructural with the path of the field that has no such form."""
    version: Node = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root_schema(resource)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {key: value for key, value in column.dump().items() if (key, value) != ("priority", 0)}
            for column in resource.columns
        ],
    }
    if resource.scale is not None:
        version["subresources"]["scale"] = {
            "specReplicasPath": resource.scale.spec_replicas,
            "statusReplicasPath": resource.scale.status_replicas,
            "labelSelectorPath": resource.scale.label_selector,
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.singular,
                "shortNames": list(resource.short_names),
                "categories": ["trimtab"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def root_schema(resource: Resource) -> Node:
    """The structural schema of a kind, with the rules on its root."""
    schema = resource.model.model_json_schema(by_alias=True)
    schema["properties"].pop("metadata")
    schema["required"] = [name for name in schema["required"] if name != "metadata"]
    body = Structure(schema.pop("$defs", {})).node(schema, "")
    return {
        "type": "object",
        "description": body["description"],
        "required": body["required"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{resource.kind}."},
            # The name is declared, and nothing asked of it, so that a rule may say that it is about the name.
            "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
            **body["properties"],
        },
        RULES_KEY: [NAME_RULE.document(), *body.get(RULES_KEY, [])],
    }


class Structure:
    """Brings the nodes of one JSON schema into structural form."""

    def __init__(self, definitions: Mapping[str, Node]) -> None:
        self._definitions = definitions

    def node(self, given: Node, path: str, within: tuple[str, ...] = ()) -> Node:
        """The structural form of a node; `within` names the definitions that it stands in, to find circles."""
        node, within = self._inline(given, path, within)
        node = _plain(_without_null(node))
        if "anyOf" in node and "$ref" in str(node["anyOf"]):
            raise NotStructural(f"{path or '.'}: a union of models; write a OneOf with one optional member each")
        if "$ref" in node:
            node, within = self._inline(node, path, within)
            node = _plain(node)
        if "items" in node:
            node["items"] = self.node(node["items"], f"{path}[]", within)
        if isinstance(node.get("additionalProperties"), dict):
            node["additionalProperties"] = self.node(node["additionalProperties"], f"{path}.*", within)
        if "properties" in node:
            node["properties"] = {
                name: self._property(name, child, node, f"{path}.{name}", within)
                for name, child in node["properties"].items()
            }
        _check(node, path or ".")
        return {key: node[key] for key in sorted(node, key=_rank)}

    def _property(self, name: str, given: Node, parent: Node, path: str, within: tuple[str, ...]) -> Node:
        child = self.node(given, path, within)
        if not child.get("description"):
            raise NotStructural(f"{path}: has no description; write a docstring below the field")
        optional_member = "anyOf" in given
        if "properties" in child and name not in parent.get("required", ()) and not optional_member:
            # An empty object lets the server fill in the defaults within, and rules may rely on its presence.
            child["default"] = {}
        return {key: child[key] for key in sorted(child, key=_rank)}

    def _inline(self, node: Node, path: str, within: tuple[str, ...]) -> tuple[Node, tuple[str, ...]]:
        reference = node.get("$ref")
        if reference is None:
            return dict(node), within
        name = str(reference).removeprefix("#/$defs/")
        if name in within:
            raise NotStructural(f"{path}: {name} holds itself; a structural schema is a tree")
        beside = {key: value for key, value in node.items() if key != "$ref"}
        return {**self._definitions[name], **beside}, (*within, name)


def _without_null(node: Node) -> Node:
    """`T | None` becomes T: in Kubernetes an absent field is None."""
    choices = node.get("anyOf")
    if choices is None:
        return node
    members = [choice for choice in choices if choice.get("type") != "null"]
    if len(members) == len(choices) or len(members) != 1:
        return node
    outer = {key: value for key, value in node.items() if key != "anyOf"}
    if outer.get("default", ...) is None:
        del outer["default"]
    return {**members[0], **outer}


def _plain(node: Node) -> Node:
    """The same meaning in the words of a structural schema."""
    node = {key: value for key, value in node.items() if key not in ("title", "examples")}
    if node.get("additionalProperties") is False:
        # The server prunes what the schema does not name, and strict field validation reports it.
        del node["additionalProperties"]
    if node.get("x-kubernetes-preserve-unknown-fields") and node.get("additionalProperties") is True:
        del node["additionalProperties"]
    if node.get("x-kubernetes-int-or-string"):
        node.pop("anyOf", None)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    for strict, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if strict in node and not isinstance(node[strict], bool):
            node[bound], node[strict] = node[strict], True
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    return node


def _check(node: Node, path: str) -> None:
    """Hold the finished node against the whitelist, and see that it is bounded."""
    if node.get("x-kubernetes-int-or-string"):
        allowed = (ANY_TYPE - {"type"}) | INT_OR_STRING
    elif node.get("type") in BY_TYPE:
        allowed = ANY_TYPE | BY_TYPE[node["type"]]
    else:
        raise NotStructural(f"{path}: type {node.get('type')!r} has no structural form")
    for strict, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(strict) and not float(node[bound]).is_integer():
            # It cuts the bound to a whole number when the value has no fraction: 0 was refused as "less than 0".
            raise NotStructural(f"{path}: the API server misreads {strict} beside {bound} {node[bound]}; include it")
    if stray := sorted(set(node) - allowed):
        raise NotStructural(f"{path}: {', '.join(stray)} has no structural form")
    if node.get("additionalProperties") is True:
        raise NotStructural(f"{path}: additionalProperties without a type; keep unknown fields, or give a type")
    if missing := _unbounded(node):
        raise NotStructural(f"{path}: give it {missing}")


def _unbounded(node: Node) -> str | None:
    """What a node lacks to be bounded, or None. CEL's cost is the product of the bounds."""
    kind = node.get("type")
    if kind == "string" and "enum" not in node and "maxLength" not in node:
        return "max_length"
    if node.get("x-kubernetes-int-or-string") and "maxLength" not in node:
        return "maxLength"
    if kind == "array" and "maxItems" not in node:
        return "max_length"
    if kind == "array" and "x-kubernetes-list-type" not in node:
        return "a list type (LIST_ATOMIC, LIST_SET or list_map)"
    if isinstance(node.get("additionalProperties"), dict) and "maxProperties" not in node:
        return "max_length"
    return None


_ORDER = (
    "description", "type", "format", "enum", "default", "nullable", "pattern", "minLength", "maxLength", "minimum",
    "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "minProperties",
    "maxProperties", "required", "properties", "items", "additionalProperties",
)  # fmt: skip


def _rank(key: str) -> tuple[int, str]:
    return (_ORDER.index(key), key) if key in _ORDER else (len(_ORDER), key)


class _Plain(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value where it stands."""
        return True


def text(document: Node) -> str:
    """A document as YAML: same input, same bytes."""
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


NOTICE = "Generated from core/trimtab_api by `make generate`; do not edit."


def chart_text(document: Node) -> str:
    """The same document as the chart's template: left out on demand, kept when the chart goes."""
    head = {key: document[key] for key in ("apiVersion", "kind")}
    body = text({"spec": document["spec"]}).replace("{{", '{{ "{{" }}')
    return (
        f"{{{{- /* {NOTICE} */}}}}\n"
        "{{- if .Values.crds.enabled }}\n"
        f"{text(head)}"
        "metadata:\n"
        f"  name: {document['metadata']['name']}\n"
        "  labels:\n"
        '    {{- include "trimtab.labels" . | nindent 4 }}\n'
        "  {{- if .Values.crds.keep }}\n"
        "  annotations:\n"
        "    helm.sh/resource-policy: keep\n"
        "  {{- end }}\n"
        f"{body}"
        "{{- end }}\n"
    )


def files() -> dict[Path, str]:
    """Every generated file, by its path below the repository's root."""
    documents = {resource.plural: crd(resource) for resource in RESOURCES}
    written: dict[Path, str] = {}
    for plural, document in documents.items():
        written[CRD_FOLDER / f"{GROUP}_{plural}.yaml"] = f"# {NOTICE}\n{text(document)}"
        written[CHART_FOLDER / f"{plural}.yaml"] = chart_text(document)
    return {**written, **docgen.files(list(documents.values()))}


def stale(wanted: Mapping[Path, str], root: Path) -> list[str]:
    """What differs between the files wanted and those below root, a sentence each."""
    found = []
    for path, content in sorted(wanted.items()):
        place = root / path
        if not place.is_file():
            found.append(f"{path} is missing")
        elif place.read_text(encoding="utf-8") != content:
            found.append(f"{path} is not what the models say")
    for folder in sorted({path.parent for path in wanted}):
        if (root / folder).is_dir():
            strays = {place.relative_to(root) for place in (root / folder).iterdir() if place.is_file()} - set(wanted)
            found += [f"{path} is generated by nothing" for path in sorted(strays)]
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the generated files, or with --check say which are stale. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="crdgen", description="Write everything that is generated from the models.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    wanted = files()
    if parser.parse_args(arguments).check:
        found = stale(wanted, root)
        sys.stderr.writelines(f"{line}\n" for line in [*found, "run `make generate` and commit the result"] if found)
        return 1 if found else 0
    for path, content in wanted.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
