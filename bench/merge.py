"""A merge beside `peft.merge_and_unload` and save: `python -m bench.merge [--json] [--layers N] [--rounds N]`.

Both fold the same LoRA into the same bfloat16 Llama of random weights (3.2 GB by default), from folder to folder, in
turns, each as a process of its own; seconds are its wall clock from start to end. Memory is its ru_maxrss: the most
pages that it had at one moment, its own and those of the files that it maps (libraries, and safetensors for PEFT); what
the kernel caches of files that are read and written is counted on neither side. The merge also makes a sha256 of each
byte and a manifest; a third row adds the check of logits, which is on by default and which PEFT does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN, INNER, HEADS, KEY_VALUE_HEADS, VOCABULARY, RANK = 2048, 8192, 32, 8, 32_000, 16
OURS = ("trimtab", "trimtabVerified")

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="1GB")
"""


class Figure(NamedTuple):
    """What one run took."""

    seconds: float
    peak_mib: float


def main() -> int:
    """Measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-", dir=options.folder) as root:
        base, adapter, size = _inputs(Path(root), options.layers)
        runs: dict[str, list[Figure]] = {name: [] for name in _commands(base, adapter, Path(root))}
        for _ in range(options.rounds):
            for name, command in _commands(base, adapter, Path(root)).items():
                runs[name].append(_measure(command, Path(root) / "output"))
    figures: dict[str, Any] = {"modelBytes": size, "rounds": options.rounds}
    for name, found in runs.items():
        seconds, peak = (statistics.median(values) for values in zip(*found, strict=True))
        figures[name] = {
            "seconds": round(seconds, 2),
            "peakMiB": round(peak),
            "each": [round(run.seconds, 2) for run in found],
        }
    for name in OURS:
        figures[name]["timeRatio"] = round(figures[name]["seconds"] / figures["peft"]["seconds"], 3)
        figures[name]["memoryRatio"] = round(figures[name]["peakMiB"] / figures["peft"]["peakMiB"], 3)
    print(json.dumps(figures) if options.json else _table(figures))
    return 0


def _commands(base: Path, adapter: Path, root: Path) -> dict[str, list[str]]:
    output = root / "output"
    ours = [sys.executable, "-m", "trimtab_trainer.merge", "--base", str(base), "--adapter", str(adapter)]
    ours += ["--output", str(output), "--max-shard-size", "1GB"]
    return {
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(output)],
        "trimtab": [*ours, "--no-verify"],
        "trimtabVerified": ours,
    }


def _measure(command: list[str], output: Path) -> Figure:
    """Seconds and peak of a process, whose output is thrown away. Raises when it fails."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {status}: {said[-2000:]}")
    return Figure(seconds, usage.ru_maxrss / 1024)


def _inputs(root: Path, layers: int) -> tuple[Path, Path, int]:
    """A base and an adapter of random weights, made by a process of its own, so that ours stays small."""
    command = [sys.executable, "-m", "bench.merge", "--make", str(root), "--layers", str(layers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return root / "base", root / "adapter", sum(file.stat().st_size for file in (root / "base").glob("*.safetensors"))


def _make(root: Path, layers: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size="1GB")
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(root / "adapter")


def _table(figures: dict[str, Any]) -> str:
    rows = [f"{figures['modelBytes'] / 1e9:.2f} GB of bfloat16, medians of {figures['rounds']} runs in turns"]
    rows.append(f"{'':<24}{'seconds':>9}{'peak MiB':>10}")
    for name in ("peft", *OURS):
        rows.append(f"{name:<24}{figures[name]['seconds']:>9.2f}{figures[name]['peakMiB']:>10}")
    for name in OURS:
        ratios = figures[name]
        rows.append(f"{f'{name} / peft':<24}{ratios['timeRatio']:>9.2f}{ratios['memoryRatio']:>10.2f}")
    return "\n".join(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--layers", type=int, default=24, help="layers of the model; 24 make 3.2 GB")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--folder", default=None, help="where to make the model; needs three times its size")
    parser.add_argument("--make", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        _make(Path(options.make), options.layers)
        sys.exit(0)
    return options


if __name__ == "__main__":
    sys.exit(main())
