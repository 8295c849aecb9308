"""Rows as they stand in files, one at a time, with the number a person finds them by."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

JSON_LIMIT = 1 << 30
"""Largest .json array, in bytes: it is read whole."""


Spoiled = Callable[[Fault], None]
"""What becomes of a broken row: raises its fault, or returns to have the row passed over."""


def strictly(fault: Fault) -> None:
    """Let a broken row end everything."""
    raise fault


class Skipped:
    """Passes broken rows over and counts them."""

    def __init__(self) -> None:
        self.rows = 0
        self.first: str | None = None
        """What was wrong with the first of them."""

    def __call__(self, fault: Fault) -> None:
        """Count a broken row."""
        self.rows += 1
        self.first = self.first or fault.message


def read(path: Path, where: str, spoiled: Spoiled = strictly) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1; the line number in .jsonl) and columns of each row of a file.

    Raises Fault(DataInvalid) that names `where` when a file does not parse; a row that does not goes to `spoiled`.
    """
    reader = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".txt": _text,
        ".parquet": _parquet,
    }[path.suffix]
    return reader(path, where, spoiled)


def broken(where: str, row: int, problem: str, hint: str = "Correct the row; the job looks again by itself.") -> Fault:
    """The fault of one row."""
    return Fault(Reason.DATA_INVALID, f"{where} row {row}: {problem}", hint)


def _json_lines(path: Path, where: str, spoiled: Spoiled) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = parse(line, where, number)
            except Fault as fault:
                spoiled(fault)
            else:
                yield number, row


def parse(line: bytes | str, where: str, number: int) -> dict[str, Any]:
    """The columns of a line of JSON. Raises Fault(DataInvalid) when it holds no JSON object."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise broken(where, number, f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise broken(where, number, f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise broken(where, number, f"must be a JSON object, is {_kind(row)}")
    return row


def _json_array(path: Path, where: str, spoiled: Spoiled) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.stat().st_size > JSON_LIMIT:
        raise broken(where, 1, "the .json file is larger than 1 GiB", "Write it as .jsonl, one object a line.")
    try:
        rows = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Fault(Reason.DATA_INVALID, f"{where}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise Fault(Reason.DATA_INVALID, f"{where}: must be a JSON array of objects, is {_kind(rows)}")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            spoiled(broken(where, number, f"must be a JSON object, is {_kind(row)}"))


def _csv(path: Path, where: str, spoiled: Spoiled) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(1 << 27)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        number = 0
        try:
            for number, row in enumerate(reader, start=1):
                if None in row:
                    spoiled(broken(where, number, "more cells than the first line has names"))
                    continue
                yield number, {name: value for name, value in row.items() if value not in (None, "")}
        except (csv.Error, UnicodeDecodeError) as error:
            raise broken(where, number + 1, f"not CSV: {error}") from error


def _text(path: Path, where: str, spoiled: Spoiled) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                spoiled(broken(where, number, f"not UTF-8 at byte {error.start}"))
                continue
            if text.strip():
                yield number, {"text": text}


def _parquet(path: Path, where: str, _spoiled: Spoiled) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise Fault(Reason.DATA_INVALID, f"{where}: not Parquet: {error}") from error


def _kind(value: object) -> str:
    names = {"str": "text", "list": "an array", "int": "a number", "float": "a number", "bool": "a truth value"}
    return names.get(type(value).__name__, "null")
