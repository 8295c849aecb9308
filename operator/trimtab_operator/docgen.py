"""Writes the reference and the runbook from what the API server enforces and what the operator says.

A page shows the finished schema, not the model: so it tells the defaults, bounds and rules that a user meets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab_api import conditions
from trimtab_api.conditions import RUNBOOK
from trimtab_api.schema import RULES_KEY

REFERENCE_FOLDER = Path("docs/reference")
RUNBOOK_FOLDER = Path("docs/runbook")
NOTICE = "<!-- Generated from core/trimtab_api by `make generate`; do not edit. -->"

Node = Mapping[str, Any]


def files(documents: Sequence[Node]) -> dict[Path, str]:
    """Every page, by its path below the repository's root."""
    pages = {REFERENCE_FOLDER / f"{_names(each)['singular']}.md": reference(each) for each in documents}
    return {
        REFERENCE_FOLDER / "README.md": contents(documents),
        **pages,
        RUNBOOK_FOLDER / "README.md": runbook(),
    }


def contents(documents: Sequence[Node]) -> str:
    """The list of pages."""
    lines = [NOTICE, "# Reference", "", "The same texts are in the cluster: `kubectl explain finetunejob.spec`.", ""]
    for document in documents:
        names, version = _names(document), _version(document)
        told = version["schema"]["openAPIV3Schema"]["description"]
        lines.append(f"- [{names['kind']}]({names['singular']}.md) (`{names['shortNames'][0]}`): {told}")
    lines += ["", "The chart's values, each with its default: [values.yaml](../../helm/trimtab/values.yaml)."]
    lines += ["", "What conditions say, and what to do about it: [runbook](../runbook/README.md).", ""]
    return "\n".join(lines)


def reference(document: Node) -> str:
    """The page of one kind."""
    names, version = _names(document), _version(document)
    root = version["schema"]["openAPIV3Schema"]
    lines = [
        NOTICE,
        f"# {names['kind']}",
        "",
        root["description"],
        "",
        f"`apiVersion: {document['spec']['group']}/{version['name']}`, `kind: {names['kind']}`; "
        f"short name `{names['shortNames'][0]}`.",
        "",
        *_rules(root, ""),
        *_columns(version["additionalPrinterColumns"]),
    ]
    shown: dict[str, str] = {}
    for part in ("spec", "status"):
        lines += _section(root["properties"][part], part, shown, level=2)
    return "\n".join(lines).rstrip() + "\n"


def _columns(columns: Sequence[Node]) -> list[str]:
    rows = [
        f"| {column['name']} | {column['description']}{' Only with `-o wide`.' if column.get('priority') else ''} |"
        for column in columns
    ]
    return ["`kubectl get` shows:", "", "| Column | Meaning |", "|---|---|", *rows, ""]


def _section(node: Node, path: str, shown: dict[str, str], level: int) -> list[str]:
    """An object's fields as a table, then the sections of the objects within."""
    shown[_shape(node)] = path
    lines = [f"{'#' * level} {path}", "", node["description"], ""]
    lines += ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    below: list[tuple[Node, str]] = []
    for name, child in node["properties"].items():
        inner, where = _inner(child, f"{path}.{name}")
        link = ""
        if "properties" in inner:
            known = shown.get(_shape(inner))
            link = f" [{'like ' + known if known else 'fields'}](#{_anchor(known or where)})"
            if known is None:
                shown[_shape(inner)] = where
                below.append((inner, where))
        required = name in node.get("required", ())
        lines.append(
            f"| `{name}` | {_type(child)}{link} | {'**required**' if required else _default(child)} "
            f"| {_cell(child['description'])} |"
        )
    lines += ["", *_rules(node, path)]
    for inner, where in below:
        lines += _section(inner, where, shown, level=3)
    return lines


def _inner(node: Node, path: str) -> tuple[Node, str]:
    """The object that a field, a list or a map holds, and its path."""
    while True:
        if "items" in node:
            node, path = node["items"], f"{path}[]"
        elif "additionalProperties" in node:
            node, path = node["additionalProperties"], f"{path}.*"
        else:
            return node, path


def _shape(node: Node) -> str:
    """What two places have in common that hold the same kind of object, whatever each says of it."""
    return json.dumps({key: value for key, value in node.items() if key not in ("description", "default")})


def _rules(node: Node, path: str) -> list[str]:
    """The rules that the API server checks, in the words that it answers with."""
    by_words: dict[str, list[str]] = {}
    for rule in _own_and_leaf_rules(node):
        where = f"`{path}{rule.get('fieldPath', '')}`".replace("`.", "`")
        if where not in by_words.setdefault(rule["message"], []):
            by_words[rule["message"]].append(where)
    lines = [f"- {', '.join(places)}: {_cell(words)}" for words, places in by_words.items()]
    return ["Refused otherwise:", "", *lines, ""] if lines else []


def _own_and_leaf_rules(node: Node) -> Iterator[Node]:
    """Rules of an object and of its fields that have no section of their own."""
    yield from node.get(RULES_KEY, ())
    for name, child in node.get("properties", {}).items():
        inner, where = _inner(child, f".{name}")
        if "properties" not in inner:
            for rule in [*child.get(RULES_KEY, ()), *(inner.get(RULES_KEY, ()) if inner is not child else ())]:
                yield {**rule, "fieldPath": where}


def _type(node: Node) -> str:
    if node.get("x-kubernetes-int-or-string"):
        return "quantity, such as `500m` or `16Gi`"
    if "items" in node:
        return _joined(f"list of {_type(node['items'])}", _count(node, "Items", "items"))
    if "additionalProperties" in node:
        return _joined(f"map to {_type(node['additionalProperties'])}", _count(node, "Properties", "keys"))
    if "enum" in node:
        return "one of " + ", ".join(f"`{value}`" for value in node["enum"])
    if node["type"] == "string":
        return _joined("time" if node.get("format") == "date-time" else "string", *_text_bounds(node))
    return _joined(node["type"], *_number_bounds(node))


def _text_bounds(node: Node) -> Iterator[str]:
    if "format" not in node:
        yield _count(node, "Length", "characters")
    if "pattern" in node:
        yield f"matching `{_cell(node['pattern'])}`"


def _number_bounds(node: Node) -> Iterator[str]:
    if "minimum" in node:
        yield f"{'more than' if node.get('exclusiveMinimum') else 'at least'} {node['minimum']}"
    if "maximum" in node:
        yield f"{'less than' if node.get('exclusiveMaximum') else 'at most'} {node['maximum']}"


def _count(node: Node, what: str, unit: str) -> str:
    least, most = node.get(f"min{what}", 0), node.get(f"max{what}")
    if most is None:
        return ""
    return f"{least} to {most} {unit}" if least else f"at most {most} {unit}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _default(node: Node) -> str:
    value = node.get("default", {})
    return "" if value == {} else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{{", "{ {")


def _anchor(path: str) -> str:
    """The anchor that Markdown viewers make of a heading."""
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "-_ ")


def _names(document: Node) -> Node:
    names: Node = document["spec"]["names"]
    return names


def _version(document: Node) -> Node:
    version: Node = document["spec"]["versions"][0]
    return version


LEADING = (
    (conditions.SUCCEEDED, "FineTuneJob and MergeJob: Unknown until the end, then True or False."),
    (conditions.READY, "ModelDeployment: whether it serves all that was asked for."),
    (conditions.PROGRESSING, "ModelDeployment: something asked for is not there yet and is being worked on."),
    (conditions.DEGRADED, "ModelDeployment: it serves, but not all that was asked for."),
    (conditions.INPUTS_SOUND, "FineTuneJob: the preflight's verdict on sources, rows, model and tokenizer."),
    (conditions.SUSPENDED, "Jobs: stopped at the user's wish."),
)


def runbook() -> str:
    """The page that tells each word, its meaning and its remedy."""
    lines = [
        NOTICE,
        "# Runbook",
        "",
        "Every condition carries one of the words below as its reason, and a message that names the field or object, "
        "what is wrong with it, and what to do. The column STATE of `kubectl get trimtab` shows the leading "
        "condition's reason; `-o wide` adds its message.",
        "",
        "| Condition | Of |",
        "|---|---|",
        *(f"| `{condition}` | {_cell(told)} |" for condition, told in LEADING),
        "",
        "| Reason | Meaning |",
        "|---|---|",
        *(f"| [{reason}](#{_anchor(reason)}) | {_cell(entry.meaning)} |" for reason, entry in RUNBOOK.items()),
        "",
    ]
    for reason, entry in RUNBOOK.items():
        lines += [f"## {reason}", "", f"{entry.meaning}", "", f"**What to do.** {entry.remedy}", ""]
    return "\n".join(lines).rstrip() + "\n"
