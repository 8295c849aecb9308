"""The memory of blocks, taken again and again.

A merge moves through gigabytes in blocks of a few megabytes. Fresh memory for each costs more than what is done with
it, because every page must be mapped and cleared; memory that the C library keeps for the next one, it keeps for each
thread. So what was a block becomes one again as soon as nobody looks at it any more.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np
import torch

_SMALLEST, _LARGEST = 1 << 16, 1 << 24
"""Bytes between which a block is taken again; between them it has a power of two."""
_M_MMAP_THRESHOLD = -3
"""malloc.h's name for the size from which memory is mapped by itself."""

_free: dict[int, list[np.ndarray]] = {}


def take(size: int) -> memoryview:
    """`size` bytes of no particular content. They are taken again when no view of them is left."""
    if size > _LARGEST:
        return np.empty(size, np.uint8).data
    whole = max(_SMALLEST, 1 << (size - 1).bit_length())
    free = _free.setdefault(whole, [])
    try:
        block = free.pop()
    except IndexError:
        block = np.empty(whole, np.uint8)
    # Every memoryview and tensor that is made of this view keeps it.
    view = block[:size]
    weakref.finalize(view, free.append, block).atexit = False
    return view.data


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of no particular content, in memory that is taken again."""
    size = math.prod(shape) * int(dtype.itemsize)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(take(size), dtype=torch.uint8).view(dtype).reshape(shape)


def release() -> None:
    """Give back what nobody looks at, because blocks of other sizes are wanted from now on."""
    for free in _free.values():
        free.clear()


def steady_memory() -> None:
    """Have the C library give large blocks back when they are freed.

    Left to itself glibc raises its threshold and keeps them in one arena for each thread: a quarter of a gigabyte.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
