"""Names and shapes of the tensors in safetensors files, read from their headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

HEADER_LIMIT = 100 << 20
"""Largest header that the format allows, in bytes."""


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ValueError when the file is not sound safetensors."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= HEADER_LIMIT:
            raise ValueError(f"{file.name} is not safetensors: its header would have {length} bytes")
        try:
            header = json.loads(content.read(length))
            return {
                name: Tensor(entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file.name} is not safetensors: {error}") from error


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of all safetensors files of a folder. Raises ValueError."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_header(file)
    return found
