"""Seconds from a process's start to the end of its first step, beside TRL's own: `python -m bench.start [--json]`.

A LoRA run on a tiny base whose files lie in a folder; both import, read, tokenise and step. Ours also takes the digest
of its inputs, as every run does. And the whole of the preflight, which imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = 64
STEPS = 2


def until(command: list[str], sign: str, log: Path, **environment: str) -> float:
    """Seconds until a line that begins with `sign`, or to the end without one."""
    began = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            if found is None and sign and line.startswith(sign):
                found = time.perf_counter() - began
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{log.read_text()[-2000:]}")
    return time.perf_counter() - began if found is None else found


def make(folder: Path) -> None:
    """The base, the rows and run.json; in a process of its own, so that nothing is imported here."""
    from bench.tiny import config, said, tiny, turn, written

    draw = random.Random(1)  # noqa: S311 - the same each time
    rows = [{"messages": turn("user", said(draw)) + turn("assistant", said(draw))} for _ in range(ROWS)]
    base = tiny(folder / "base")
    training = {"maxSteps": STEPS, "perDeviceBatchSize": 4, "gradientAccumulationSteps": 1}
    wanted = config(base, written(rows, folder / "rows.jsonl"), folder / "out", method="sft", training=training)
    (folder / "run.json").write_text(wanted.model_dump_json(by_alias=True, exclude_none=True))


def bare(folder: Path) -> None:
    """The script that people write."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Tell(TrainerCallback):
        def on_step_end(self, _args: object, state: object, *_: object, **__: object) -> None:
            print(f"step {state.global_step}", flush=True)  # type: ignore[attr-defined]

    trainer = SFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(
            output_dir=str(folder / "bare"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Tell()],
    )
    trainer.train()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make or options.bare:
        make(options.make) if options.make else bare(options.bare)
        return 0
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "preflight": []}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        folder, python = Path(name), [sys.executable, "-m"]
        log = folder / "log"
        until([*python, "bench.start", "--make", name], "", log)
        places = {
            "TRIMTAB_RUN_FILE": str(folder / "run.json"),
            "TRIMTAB_TERMINATION_LOG": str(folder / "message"),
            "TRIMTAB_BAR": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }
        for number in range(options.rounds):
            places["TRIMTAB_WORK"] = str(folder / f"work-{number}")
            (folder / f"work-{number}").mkdir()
            # A run goes on from what lies in its output.
            subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
            seconds["ours"].append(until([*python, "trimtab_trainer"], "step 1/", log, **places))
            seconds["bare"].append(until([*python, "bench.start", "--bare", name], "step 1", log, **places))
            seconds["preflight"].append(until([*python, "trimtab_trainer.preflight"], "", log, **places))
    took = {way: statistics.median(each) for way, each in seconds.items()}
    if options.json:
        print(json.dumps(took))
    else:
        print(
            f"first step after {took['ours']:.1f} s   TRL's own script {took['bare']:.1f} s   "
            f"{took['ours'] / took['bare']:.0%}   preflight {took['preflight']:.1f} s in all"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
