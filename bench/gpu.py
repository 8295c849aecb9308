"""Tokens/s, MFU and memory on one GPU: `python -m bench.gpu [--json] [ROW…]`; `--tiny` runs the same on any processor.

The model has the shape of Qwen2.5-7B and random weights: what they are changes no speed. Published beside it, for the
row `lora` on one H100: 14,110 tokens/s with 16 passes to a step (NeMo AutoModel, docs/performance-summary.mdx).

    lora    rank 16, sequences of 4096 tokens, 2 in a pass, 4 passes to a step, bf16, activations kept
    qlora   rank 16 over 4-bit weights, 2048 tokens, 1 in a pass
    full    all weights in pure bf16, 2048 tokens, 1 in a pass, activations recomputed
    bare    the row lora without us: transformers and PEFT in a plain loop

MFU is 4 N FLOP a token for adapters (forward, and the gradient of activations) and 6 N for full tuning, over the
card's dense bf16 peak; attention's own products and what is recomputed are not counted. Each row is a process of its
own and ends after its last step: publishing is not timed. A row whose libraries are missing says so.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

PUBLISHED = {"lora": 14_110}
PEAK = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 FLOP/s of a card, by a part of its name."""
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    **QWEN, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
WARM_UP = 2
"""Steps that are not counted."""


@dataclass(frozen=True)
class Row:
    """What is run."""

    length: int
    batch: int
    passes: int
    flops: int
    """FLOP for each token and weight."""
    document: dict[str, Any]
    """Its part of a spec."""
    checkpointing: bool = False
    rate: float = 1e-4


LORA = {"tuner": {"type": "lora", "lora": {"rank": 16, "alpha": 32, "dropout": 0}}}
ROWS = {
    "lora": Row(4096, 2, 4, 4, LORA),
    "qlora": Row(2048, 1, 4, 4, {**LORA, "model": {"quantization": {"method": "bnb4"}}}),
    "full": Row(2048, 1, 4, 6, {"tuner": {"type": "full"}, "training": {"pureBf16": True}}, checkpointing=True),
    "bare": Row(4096, 2, 4, 4, {}),
}


class Enough(Exception):
    """All steps are done."""


class Steps:
    """The clock of a row: when each step ended, with the device idle."""

    def __init__(self, wanted: int, began: float):
        self.losses: list[float] = []
        self._wanted = wanted
        self._began = began
        self._ends: list[float] = []

    def end(self) -> None:
        """A step has ended. Raises Enough after the last."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.time())
        if len(self._ends) == self._wanted:
            raise Enough

    def told(self, row: Row, weights: int) -> dict[str, Any]:
        """What was measured. None: not on this machine."""
        seconds = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)][WARM_UP - 1 :]
        speed = row.length * row.batch * row.passes / statistics.median(seconds)
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        peak = next((flops for name, flops in PEAK.items() if name in (card or "")), None)
        return {
            "device": card or "cpu",
            "tokensPerSecond": speed,
            "mfu": None if peak is None else speed * row.flops * weights / peak,
            "peakBytes": torch.cuda.max_memory_allocated() if card else None,
            "firstStepSeconds": self._ends[0] - self._began,
            "steps": len(seconds),
            "weights": weights,
            "losses": self.losses,
        }


def base(folder: Path, shape: dict[str, Any], length: int) -> Path:
    """A model of random weights and a tokenizer of few tokens, as files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimtab_trainer.model import tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = {name: value for name, value in shape.items() if name != "model_type"}
    described = AutoConfig.for_model(shape["model_type"], **told)
    tokenizer.learn([{"text": text} for text in texts(4, 60)], 340, None, None, folder)
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(1, length)))
    return folder


def texts(count: int, words: int) -> list[str]:
    """Words by chance, the same each time."""
    draw = random.Random(1)  # noqa: S311 - the same each time
    known = ("harbour", "calm", "tonight", "ship", "home", "light", "rudder", "sail", "tide", "mast")
    return [" ".join(draw.choices(known, k=words)) for _ in range(count)]


def trained(name: str, row: Row, folder: Path, steps: Steps) -> int:
    """The row as a FineTuneJob runs it; returns the number of weights."""
    from transformers import TrainerCallback

    from bench.tiny import config
    from trimtab_trainer.distributed import Group, Place
    from trimtab_trainer.notice import Notice
    from trimtab_trainer.progress import Silent
    from trimtab_trainer.run import Run

    weights = 0

    class Told(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                steps.losses.append(logs["loss"])

    class Timed(Run):
        def _trainer(self, model: Any, *parts: Any) -> Any:
            nonlocal weights
            weights = model.num_parameters()
            made = super()._trainer(model, *parts)
            made[0].add_callback(Told())
            return made

    document = {key: dict(value) for key, value in row.document.items()}
    training = {
        "maxSteps": 10_000, "perDeviceBatchSize": row.batch, "gradientAccumulationSteps": row.passes,
        "gradientCheckpointing": row.checkpointing, "loggingSteps": 1, "learningRate": row.rate,
        **document.pop("training", {}),
    }  # fmt: skip
    model = {"from": {"fineTuneJob": {"name": "base"}}, **document.pop("model", {})}
    wanted = config(
        folder / "base", folder / "base/rows.jsonl", folder / name,
        method="pretrain", model=model, training=training, dataset={"maxLength": row.length},
        checkpoint={"saveSteps": 10_000}, **document,
    )  # fmt: skip
    try:
        run = Timed(wanted, Group(Place(0, 0, 1, 1), 1, 60), folder / f"work-{name}", Notice(), Silent())
        run()
    except Enough:
        return weights
    raise AssertionError("the run ended before its last step")


def plain(row: Row, folder: Path, steps: Steps) -> int:
    """transformers and PEFT in a loop, with torch's fused AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).to(device)
    weights = int(model.num_parameters())
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=1e-4, fused=True)
    ids = torch.randint(0, 300, (row.batch, row.length), device=device)
    model.train()
    try:
        while True:
            for _ in range(row.passes):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / row.passes
                loss.backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            steps.losses.append(float(loss) * row.passes)
            steps.end()
    except Enough:
        return weights


def run_row(name: str, folder: Path, wanted: int, began: float, tiny: bool) -> dict[str, Any]:
    """One row, in this process."""
    row = ROWS[name]
    if tiny:
        row = replace(row, length=64, rate=3e-3)
    steps = Steps(wanted, began)
    weights = plain(row, folder, steps) if name == "bare" else trained(name, row, folder, steps)
    return steps.told(row, weights)


def sentence(name: str, found: dict[str, Any]) -> str:
    """A row's line."""
    if "missing" in found:
        return f"{name:8}not measured: {found['missing']}"
    parts = [f"{name:8}{found['device']}: {found['tokensPerSecond']:,.0f} tokens/s"]
    if name in PUBLISHED and found["mfu"] is not None:
        parts.append(f"{found['tokensPerSecond'] / PUBLISHED[name]:.0%} of {PUBLISHED[name]:,} published for an H100")
    parts.append(
        "MFU not measured: no peak is known for this device" if found["mfu"] is None else f"MFU {found['mfu']:.1%}"
    )
    memory = found["peakBytes"]
    parts.append("memory not measured: no GPU" if memory is None else f"peak {memory / 2**30:.1f} GiB")
    parts.append(f"first step after {found['firstStepSeconds']:.1f} s")
    return ", ".join(parts) + f" (median of {found['steps']} steps)"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a small model and 64 tokens: no speed to speak of")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row == "base":
        base(options.folder / "base", TINY if options.tiny else QWEN, 2000 if options.tiny else 400_000)
        return 0
    if options.row:
        found = run_row(options.row, options.folder, options.steps, options.began, options.tiny)
        (options.folder / f"{options.row}.json").write_text(json.dumps(found))
        return 0
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if not torch.cuda.is_available() and not options.tiny:
        print("no GPU is here: nothing is measured; --tiny runs every row on this processor, to see that they run")
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        found = measure(Path(name), options.rows or list(ROWS), options.steps, options.tiny, options.json)
    if options.json:
        print(json.dumps(found))
    elif options.tiny:
        print("a tiny model: these figures show that the rows run, and nothing of their speed")
    return int(any("missing" in each and "No module named" not in each["missing"] for each in found.values()))


def measure(folder: Path, rows: list[str], steps: int, tiny: bool, quiet: bool) -> dict[str, dict[str, Any]]:
    """Each row in a process of its own; what cannot run is told by its last line."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("base", *rows):
        own = ["--row", name, "--folder", str(folder), "--steps", str(steps), "--began", str(time.time())]
        command = [sys.executable, "-m", "bench.gpu", *own, *(["--tiny"] if tiny else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 and name == "base":
            raise SystemExit(done.stderr[-3000:])
        if name == "base":
            continue
        path = folder / f"{name}.json"
        last = (done.stderr.strip().splitlines() or ["ended without a word"])[-1]
        found[name] = json.loads(path.read_text()) if done.returncode == 0 else {"missing": last}
        if not quiet:
            print(sentence(name, found[name]), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
