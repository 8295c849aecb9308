"""Rows/s and tokens/s from a file to token ids, beside `datasets`: `python -m bench.preprocessing [--json]`.

Ours reads, checks, templates, tokenises, masks what is not learnt and writes Arrow. `datasets.map` does it with
apply_chat_template: once for the tokens alone, once with the mask of the assistant's tokens, as TRL asks for it.
One process and one thread each, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tiny import config, said, tiny, turn, written
from trimtab_trainer import workplace
from trimtab_trainer.data import collecting, sequences
from trimtab_trainer.data.reading import strictly
from trimtab_trainer.inputs import Pins, fetch_data
from trimtab_trainer.methods import METHODS
from trimtab_trainer.model import tokenizer
from trimtab_trainer.template import ChatTemplate


@dataclass(frozen=True)
class Took:
    """Seconds by the wall and by the processor, and the tokens made."""

    wall: float
    processor: float
    tokens: int


def ours(base: Path, data: Path, folder: Path) -> Took:
    """What a run does before its model is loaded."""
    words = tokenizer.load(base, "base")
    wanted = config(base, data, folder / "out", method="sft")
    method, dataset = METHODS["sft"], wanted.spec.dataset
    began = time.perf_counter(), time.process_time()
    train = [fetch_data(source, folder / "data", Pins(wanted.pins)) for source in wanted.train]
    collected = collecting.collect(train, [], dataset, method.needs(wanted), folder / "rows")
    special = {name: str(token) for name, token in words.special_tokens_map.items() if isinstance(token, str)}
    template = ChatTemplate.of(tokenizer.own_template(words), None, None, special, None)
    encoder = method.encoder(wanted, words, template.renderer())
    count = sequences.write(collected.train, encoder, folder / "train.arrow", strictly)
    return Took(time.perf_counter() - began[0], time.process_time() - began[1], count.tokens)


def theirs(base: Path, data: Path, folder: Path, **asked: Any) -> Took:
    """The same of `datasets`; `asked` goes to apply_chat_template."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    words = AutoTokenizer.from_pretrained(base)
    began = time.perf_counter(), time.process_time()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder / "cache"))
    made = rows.map(
        lambda row: dict(words.apply_chat_template(row["messages"], tokenize=True, return_dict=True, **asked)),
        remove_columns=rows.column_names,
    )
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    return Took(wall, processor, sum(map(len, made["input_ids"])))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    ways: dict[str, Callable[[Path, Path, Path], Took]] = {
        "ours": ours,
        "tokens": theirs,
        "masked": lambda *paths: theirs(*paths, return_assistant_tokens_mask=True),
    }
    draw = random.Random(1)  # noqa: S311 - the same each time
    rows = [{"messages": turn("user", said(draw)) + turn("assistant", said(draw, 120))} for _ in range(options.rows)]
    found: dict[str, list[Took]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="bench-preprocessing-") as name:
        root = Path(name)
        workplace.prepare(root / "place", hub=False)
        base, data = tiny(root / "base"), written(rows, root / "rows.jsonl")
        for number in range(options.rounds):
            for way, does in ways.items():
                folder = root / f"{way}-{number}"
                folder.mkdir()
                found[way].append(does(base, data, folder))
    wall = {way: statistics.median(each.wall for each in took) for way, took in found.items()}
    processor = {way: statistics.median(each.processor for each in took) for way, took in found.items()}
    tokens = {way: took[0].tokens for way, took in found.items()}
    if options.json:
        print(json.dumps({"wall": wall, "processor": processor, "tokens": tokens, "rows": options.rows}))
        return 0
    for way, told in (("ours", "ours"), ("tokens", "datasets.map"), ("masked", "datasets.map, masked")):
        ratio = f"   ours is {wall[way] / wall['ours']:.1f} times as fast, {processor[way] / processor['ours']:.1f} of "
        print(
            f"{told:22}{options.rows / wall[way]:8.0f} rows/s {tokens[way] / wall[way]:10.0f} tokens/s"
            + ("" if way == "ours" else f"{ratio}processor time")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
