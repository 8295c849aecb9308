"""Steps/s of a run beside the same TRL script run bare: `python -m bench.trainer [--json] [--steps N] [--rounds N]`.

Both train the same random Llama on the same sequences with the same arguments, two checkpoints included, in processes
of their own, in turns; the figures are medians of the library's own train_steps_per_second. Ours also agrees on
preemption at each step, hashes and publishes its checkpoints, and reports.
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
from pathlib import Path
from typing import Any

from trimtab_api.contract import DataInput, JobIdentity, OutputTarget, RunConfig
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec

BATCH = 8
RATE = 1e-3
MAX_LENGTH = 128


def rows(count: int = 400) -> str:
    """Sentences of several lengths, the same each time."""
    draw = random.Random(1)  # noqa: S311 - the same each time
    words = [
        "the",
        "harbour",
        "is",
        "calm",
        "tonight",
        "and",
        "every",
        "ship",
        "that",
        "comes",
        "home",
        "finds",
        "its",
        "light",
        "again",
    ]
    texts = (" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(count))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def config(steps: int, data: Path, output: Path) -> RunConfig:
    """run.json of our run."""
    spec = FineTuneJobSpec.model_validate(
        {
            "method": "pretrain",
            "model": {
                "scratch": {
                    "modelType": "llama",
                    "hiddenSize": 256,
                    "layers": 4,
                    "attentionHeads": 8,
                    "maxLength": MAX_LENGTH,
                    "tokenizer": {"train": {"vocabSize": 2048}},
                }
            },
            "dataset": {"train": [{"from": {"volume": {"claimName": "data"}}}], "maxLength": MAX_LENGTH},
            "training": {
                "maxSteps": steps,
                "perDeviceBatchSize": BATCH,
                "gradientAccumulationSteps": 1,
                "learningRate": RATE,
                "gradientCheckpointing": False,
            },
            "checkpoint": {"saveSteps": steps // 2},
        }
    )
    return RunConfig(
        job=JobIdentity(namespace="bench", name="bench", uid="bench"),
        attempt=1,
        spec=spec,
        resolved=resolve(spec),
        train=[DataInput(field="dataset.train[0]", part=spec.dataset.train[0], path=str(data))],
        output=OutputTarget(path=str(output)),
    )


def ours(steps: int, folder: Path) -> float:
    """Steps/s of `python -m trimtab_trainer`."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text(rows())
    (folder / "run.json").write_text(
        config(steps, data, folder / "out").model_dump_json(by_alias=True, exclude_none=True)
    )
    environment = {
        "TRIMTAB_RUN_FILE": str(folder / "run.json"),
        "TRIMTAB_WORK": str(folder / "work"),
        "TRIMTAB_BAR": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    log = folder / "log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "trimtab_trainer"]
        subprocess.run(command, env={**os.environ, **environment}, stdout=stream, stderr=stream, check=True)
    history: list[dict[str, Any]] = json.loads((folder / "out/report/history.json").read_text())
    return float(history[-1]["train_steps_per_second"])


def bare(steps: int, made: Path) -> float:
    """Steps/s of TRL alone on what our run has made: its sequences and the shape of its model."""
    command = [sys.executable, "-m", "bench.trainer", "--bare", str(made), "--steps", str(steps)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_bare(steps: int, made: Path) -> None:
    """The script that people write."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    set_seed(42)
    artifact = made / "out/artifact"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(artifact)),
        args=SFTConfig(
            output_dir=str(made / "bare"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.95,
            gradient_checkpointing=False,
            logging_steps=5,
            save_steps=steps // 2,
            use_cpu=True,
            bf16=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_file(str(made / "work/run/sequences/train.arrow")),
        processing_class=AutoTokenizer.from_pretrained(artifact),
    )
    print(trainer.train().metrics["train_steps_per_second"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=Path)
    options = parser.parse_args()
    if options.bare:
        run_bare(options.steps, options.bare)
        return 0
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="bench-trainer-") as name:
        for number in range(options.rounds):
            folder = Path(name) / str(number)
            speeds["ours"].append(ours(options.steps, folder))
            speeds["bare"].append(bare(options.steps, folder))
    mine, theirs = statistics.median(speeds["ours"]), statistics.median(speeds["bare"])
    if options.json:
        print(json.dumps({"ours": speeds["ours"], "bare": speeds["bare"], "ratio": mine / theirs}))
    else:
        print(f"trainer {mine:.2f} steps/s  bare TRL {theirs:.2f} steps/s  {mine / theirs:.1%} (want >= 98 %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
