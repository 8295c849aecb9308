"""The safetensors format: an eight-byte length, a JSON header, then the tensors' bytes, each at a known offset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault

PREFIX = 8
"""Bytes before the header: its length, little endian."""
HEADER_LIMIT = 100_000_000
"""Longest header that the format allows, in bytes."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The format's names of types."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes stand."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    """Path of the file below its folder."""
    start: int = 0
    """Offset of the first byte in the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """The header's length from the file's first eight bytes. Raises Fault(ModelInvalid) for one that cannot be."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX or not 2 <= length <= min(HEADER_LIMIT, file_size - PREFIX):
        raise _broken(file, f"its header would have {length} bytes")
    return length


def parse_header(header: bytes, file: str, file_size: int) -> list[TensorInfo]:
    """The tensors of a file, in the order of their bytes.

    Raises Fault(ModelInvalid) when the header is no header, or promises bytes that the file does not have.
    """
    try:
        document: dict[str, Any] = json.loads(header)
        document.pop("__metadata__", None)
        tensors = [_entry(name, entry, file, PREFIX + len(header)) for name, entry in document.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(file, f"its header does not parse ({type(error).__name__}: {error})") from error
    tensors.sort(key=lambda tensor: tensor.start)
    end = PREFIX + len(header)
    for tensor in tensors:
        if tensor.start < end:
            raise _broken(file, f"tensor {tensor.name} overlaps another one")
        end = tensor.start + tensor.size
    if end > file_size:
        raise _broken(file, f"it has {file_size} bytes where its header promises {end}")
    return tensors


def build_header(tensors: Iterable[TensorInfo]) -> tuple[bytes, list[int]]:
    """The bytes before the first tensor when these stand one after the other, and the offset of each in the file."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.size)
        offsets = [ends[-2], ends[-1]]
        document[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(PREFIX, "little") + text
    return whole, [len(whole) + end for end in ends[:-1]]


def _entry(name: str, entry: dict[str, Any], file: str, data: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown type {entry['dtype']}")
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    tensor = TensorInfo(name, DTYPES[entry["dtype"]], shape, file, data + begin)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != tensor.size:
        raise ValueError(f"tensor {name} of shape {list(shape)} takes {tensor.size} bytes, not {end - begin}")
    return tensor


def _broken(file: str, problem: str) -> Fault:
    return Fault(Reason.MODEL_INVALID, f"{file} is not a sound safetensors file: {problem}", "Publish the model again.")
