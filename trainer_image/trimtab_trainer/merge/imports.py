"""What a merge does without: libraries that transformers and PEFT load whenever they are installed.

They would be two seconds and a quarter of a gigabyte, before the first byte of a model is read.
"""

from __future__ import annotations

import sys
from typing import Any

UNUSED = ("bitsandbytes", "scipy", "sklearn", "torchvision", "triton")
"""Quantised layers, losses of object detection, assisted generation, pictures, kernels of GPUs."""


def leave_out_unused() -> None:
    """Let the libraries that are not loaded yet pass for not installed, in this process."""
    modules: dict[str, Any] = sys.modules
    for name in UNUSED:
        modules.setdefault(name, None)
