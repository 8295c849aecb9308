"""What only a GPU can show: losses as on a processor, bf16 by itself, and the rows of `make bench-gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here: torch.cuda.is_available() says so"),
]


def bench(*rows: str, **environment: str) -> dict[str, dict[str, Any]]:
    """The rows of `python -m bench.gpu --tiny`."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--tiny", "--json", "--steps", "6", *rows],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    missing = {name: each["missing"] for name, each in found.items() if "missing" in each}
    if missing:
        pytest.skip(f"a library is not here: {missing}")
    return found


def test_an_adapter_learns_as_on_a_processor() -> None:
    here, there = bench("lora")["lora"], bench("lora", CUDA_VISIBLE_DEVICES="")["lora"]
    assert there["device"] == "cpu"
    assert here["device"] == torch.cuda.get_device_name()
    # bf16 here, float32 there.
    assert here["losses"] == pytest.approx(there["losses"], abs=5e-2)
    assert here["losses"][-1] < here["losses"][0]


@pytest.mark.parametrize("row", ["qlora", "full"])
def test_other_ways_run(row: str) -> None:
    found = bench(row)[row]
    assert found["losses"][-1] < found["losses"][0]
    assert found["peakBytes"] > 0
