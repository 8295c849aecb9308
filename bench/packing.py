"""Rows/s with packing beside without: `python -m bench.packing [--json]`.

One epoch of supervised tuning on the same rows with the same batch size, a small one as large models have it and one
that fills this computer. Without packing a small batch wastes passes, a large one padding. The rows' lengths are spread
as those of conversations are, most of them short and a few long: log-normal, on the mean a fifth of dataset.maxLength.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from bench.tiny import MAX_LENGTH, WORDS, Row, config, timed, tiny, turn, written
from trimtab_trainer import workplace

BATCHES = (2, 16)


def rows(count: int) -> list[Row]:
    """Conversations of one turn."""
    draw = random.Random(1)  # noqa: S311 - the same each time
    lengths = [min(MAX_LENGTH - 60, max(4, round(draw.lognormvariate(3.0, 1.0)))) for _ in range(count)]
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    return [{"messages": turn("user", "and?") + turn("assistant", text)} for text in texts]


def speed(base: Path, folder: Path, count: int, packed: bool, batch: int) -> float:
    """Rows per second of the training loop."""
    data = written(rows(count), folder / "rows.jsonl")
    wanted = config(
        base,
        data,
        folder / "out",
        method="sft",
        tuner={"type": "full"},
        dataset={"packing": {}} if packed else {},
        training={"perDeviceBatchSize": batch, "gradientAccumulationSteps": 1, "gradientCheckpointing": False},
        checkpoint={"saveSteps": 10_000},
    )
    return count / timed(wanted, folder).wall


def compared(base: Path, root: Path, count: int, rounds: int, batch: int) -> dict[str, float]:
    """The medians of some rounds, and their ratio."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for packed in found:
            found[packed].append(speed(base, root / f"{number}-{packed}", count, packed, batch))
    packed, single = statistics.median(found[True]), statistics.median(found[False])
    return {"packed": packed, "unpacked": single, "ratio": packed / single}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as name:
        root = Path(name)
        workplace.prepare(root / "place", hub=False)
        base = tiny(root / "base")
        for batch in BATCHES:
            found[batch] = compared(base, root / str(batch), options.rows, options.rounds, batch)
    if options.json:
        print(json.dumps(found))
        return 0
    for batch, each in found.items():
        speeds = f"packed {each['packed']:.0f} rows/s   one by one {each['unpacked']:.0f}"
        print(f"batch {batch:2}: {speeds}   {each['ratio']:.1f} times (want >= 3)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
