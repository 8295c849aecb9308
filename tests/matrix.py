"""The matrix of methods and ways with the test that proves each cell: docs/matrix.md, read from the tests' own marks.

    python -m tests.matrix            write the page
    python -m tests.matrix --check    exit with 1 when it is not what the marks say

A test marks the cells that it proves: `@proves("dpo", "full", "lora")`. The marks are read, not run, so their words are
literals. A cell without a test is printed as it is: empty.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from trimtab_api.v1alpha1.finetunejob import Method

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "matrix.md"
WAYS = {
    "full": "full",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "ddp": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
    "nodes": "two nodes",
    "pods": "as pods",
    "sequence": "sequence",
    "tensor": "tensor",
    "expert": "expert",
    "images": "images",
    "video": "video",
    "audio": "audio",
    "resume": "resume",
}
"""The columns, by the word that a mark uses."""

Test = TypeVar("Test", bound=Callable[..., Any])


def proves(method: str, *ways: str) -> Callable[[Test], Test]:
    """Mark a test with the cells that it proves. Raises ValueError for a method or way that there is none of."""
    if method not in get_args(Method):
        raise ValueError(f"{method!r} is no method")
    if unknown := set(ways) - set(WAYS):
        raise ValueError(f"{sorted(unknown)} are no ways; known are {', '.join(WAYS)}")
    return lambda test: test


def marks() -> Iterator[tuple[str, str, Path, str]]:
    """Method, way, file and test of every mark."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", None) == "proves":
                    method, *ways = [ast.literal_eval(each) for each in mark.args]
                    yield from ((method, way, path.relative_to(ROOT), node.name) for way in ways)


def page() -> str:
    """The page as the marks have it now."""
    cells: dict[tuple[str, str], list[tuple[Path, str]]] = defaultdict(list)
    for method, way, path, test in marks():
        cells[method, way].append((path, test))
    numbers = {place: number for number, place in enumerate(sorted(set().union(*cells.values())), start=1)}
    lines = [
        "# What is proved",
        "",
        "Each cell names the tests that prove a method in a way, by their number in the list below. An empty cell has",
        "no test of its own. Written by `make generate` from the marks of the tests.",
        "",
        "| method | " + " | ".join(WAYS.values()) + " |",
        "|---|" + "---|" * len(WAYS),
    ]
    for method in get_args(Method):
        found = [" ".join(str(numbers[place]) for place in sorted(set(cells[method, way]))) for way in WAYS]
        lines.append(f"| `{method}` | " + " | ".join(found) + " |")
    lines.append("")
    lines += [f"{number}. [{test}](../{path})" for (path, test), number in numbers.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check the page."""
    wanted = page()
    if "--check" not in sys.argv:
        PAGE.write_text(wanted)
        return 0
    if PAGE.is_file() and PAGE.read_text() == wanted:
        return 0
    sys.stderr.write("docs/matrix.md is not what the tests' marks say; run `make generate`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
