"""Steps/s of each method beside its library's own trainer: `python -m bench.methods [--json] [METHOD…]`.

Both tune the same tiny model in full on the same rows with the same arguments, in turns, in one process and one thread,
because importing takes longer than a run; only the loop is timed, with one checkpoint in it. The bare trainer is given
rows as its documentation asks for them. Ours also agrees on preemption at each step, hashes and publishes its
checkpoint, and reports. The second ratio is of processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bench.tiny import Clock, Row, config, forget, said, timed, tiny, turn, written
from trimtab_trainer import workplace
from trimtab_trainer.rewards import named

RATE = 1e-5
GENERATIONS, ANSWER = 4, 16


@dataclass(frozen=True)
class Side:
    """A method: its rows for us, its rows for the library, and the library's trainer."""

    batch: int
    ours: Callable[[random.Random], Row]
    theirs: Callable[[Row], list[Row]]
    trainer: Callable[[Bare], Any]
    block: dict[str, Any] = field(default_factory=dict)
    """What the spec says beside the common fields."""


@dataclass
class Bare:
    """What the library's trainer is made of."""

    base: Path
    made: Path
    """Where our run of the same method worked."""
    rows: list[Row]
    args: dict[str, Any]

    @property
    def dataset(self) -> Any:
        """The rows."""
        from datasets import Dataset

        return Dataset.from_list(self.rows)

    def language(self) -> Any:
        """The base."""
        return AutoModelForCausalLM.from_pretrained(self.base)

    def scalar(self, labels: int = 1) -> Any:
        """The base with a head."""
        return AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=labels)

    @property
    def tokenizer(self) -> Any:
        """Of the base."""
        return AutoTokenizer.from_pretrained(self.base)


def sft(bare: Bare) -> Any:
    """TRL; the rows are already tokens, as for ours."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer(
        model=bare.language(),
        args=SFTConfig(**bare.args, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_file(str(bare.made / "run/sequences/train.arrow")),
        processing_class=bare.tokenizer,
    )


def dpo(bare: Bare) -> Any:
    """TRL, with a reference of its own."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer(
        model=bare.language(),
        ref_model=bare.language(),
        args=DPOConfig(**bare.args, max_length=None),
        train_dataset=bare.dataset,
        processing_class=bare.tokenizer,
    )


def kto(bare: Bare) -> Any:
    """TRL, with a reference of its own."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    return KTOTrainer(
        model=bare.language(),
        ref_model=bare.language(),
        args=KTOConfig(**bare.args, max_length=None),
        train_dataset=bare.dataset,
        processing_class=bare.tokenizer,
    )


def reward(bare: Bare) -> Any:
    """TRL."""
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    return RewardTrainer(
        model=bare.scalar(),
        args=RewardConfig(**bare.args, max_length=None),
        train_dataset=bare.dataset,
        processing_class=bare.tokenizer,
    )


def grpo(bare: Bare) -> Any:
    """TRL, with the same formula for a reward."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def repetition(completions: list[Any], **_: Any) -> list[float]:
        return [named.repetition(each[0]["content"]) for each in completions]

    return GRPOTrainer(
        model=bare.language(),
        args=GRPOConfig(
            **bare.args,
            num_generations=GENERATIONS,
            max_completion_length=ANSWER,
            temperature=0.9,
            beta=0.0,
            loss_type="grpo",
            disable_dropout=True,
        ),
        reward_funcs=repetition,
        train_dataset=bare.dataset,
        processing_class=bare.tokenizer,
    )


def labels(bare: Bare) -> Any:
    """transformers."""
    words = bare.tokenizer
    model = bare.scalar(labels=2)
    model.config.pad_token_id = words.pad_token_id
    return Trainer(
        model=model,
        args=TrainingArguments(**bare.args),
        data_collator=DataCollatorWithPadding(words),
        train_dataset=bare.dataset.map(lambda row: words(row["text"]), remove_columns=["text"]),
        processing_class=words,
    )


def vectors(bare: Bare) -> Any:
    """sentence-transformers."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    body = Transformer(str(bare.base))
    pooling = Pooling(body.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[body, pooling, Normalize()], device="cpu")
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**bare.args),
        train_dataset=bare.dataset,
        loss=MultipleNegativesRankingLoss(model),
    )


def scores(bare: Bare) -> Any:
    """sentence-transformers; a query with two documents is two of its rows."""
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    headed = str(bare.made / "headed")
    bare.scalar().save_pretrained(headed)
    bare.tokenizer.save_pretrained(headed)
    model = CrossEncoder(headed, num_labels=1, device="cpu")
    double = 2 * bare.args["per_device_train_batch_size"]
    return CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**{**bare.args, "per_device_train_batch_size": double}),
        train_dataset=bare.dataset,
        loss=BinaryCrossEntropyLoss(model),
    )


def _pair(draw: random.Random) -> Row:
    return {"messages": turn("user", said(draw)) + turn("assistant", said(draw)), "rejected_response": said(draw)}


def _pair_apart(row: Row) -> list[Row]:
    question, answer = row["messages"]
    other = {"role": "assistant", "content": row["rejected_response"]}
    return [{"prompt": [question], "chosen": [answer], "rejected": [other]}]


def _pair_whole(row: Row) -> list[Row]:
    question, answer = row["messages"]
    other = {"role": "assistant", "content": row["rejected_response"]}
    return [{"chosen": [question, answer], "rejected": [question, other]}]


def _judged(draw: random.Random) -> Row:
    return {
        "messages": turn("user", said(draw)) + turn("assistant", said(draw)),
        "label": draw.random() < 0.5,
    }


SIDES = {
    "sft": Side(
        8,
        lambda draw: {"messages": turn("user", said(draw)) + turn("assistant", said(draw))},
        lambda _row: [],
        sft,
        {"dataset": {"loss": "all"}},
    ),
    "dpo": Side(4, _pair, _pair_apart, dpo),
    "kto": Side(
        4,
        _judged,
        lambda row: [{"prompt": row["messages"][:1], "completion": row["messages"][1:], "label": row["label"]}],
        kto,
    ),
    "rewardModel": Side(4, _pair, _pair_whole, reward),
    "grpo": Side(
        4,
        lambda draw: {"messages": turn("user", said(draw))},
        lambda row: [{"prompt": row["messages"]}],
        grpo,
        {
            "grpo": {
                "rewards": [{"name": "repetition"}],
                "numGenerations": GENERATIONS,
                "maxCompletionLength": ANSWER,
                "beta": 0,
            }
        },
    ),
    "sequenceClassification": Side(
        8,
        lambda draw: {"text": said(draw), "label": draw.randint(0, 1)},
        lambda row: [row],
        labels,
        {"classification": {"numLabels": 2}},
    ),
    "embedding": Side(
        8,
        lambda draw: {"anchor": said(draw), "positive": said(draw)},
        lambda row: [row],
        vectors,
    ),
    "reranker": Side(
        4,
        lambda draw: {"query": said(draw, 20), "positive": said(draw), "negative": said(draw)},
        lambda row: [
            {"query": row["query"], "document": row[name], "label": float(name == "positive")}
            for name in ("positive", "negative")
        ],
        scores,
    ),
}
ALONE = {
    "pretrain": "bench.trainer holds it against TRL",
    "cpo": "TRL has it as an experiment alone",
    "simpo": "TRL has it as an experiment alone",
    "orpo": "TRL has it as an experiment alone",
    "ppo": "TRL has it as an experiment alone",
    "gkd": "TRL's is on-policy alone",
}
"""Methods without a stable trainer in a library, and why."""


def ours(method: str, side: Side, rows: list[Row], base: Path, folder: Path, steps: int) -> Clock:
    """Our run."""
    training = {
        "maxSteps": steps,
        "perDeviceBatchSize": side.batch,
        "gradientAccumulationSteps": 1,
        "learningRate": RATE,
        "gradientCheckpointing": False,
    }
    data = written(rows, folder / "rows.jsonl")
    fixed = {"method": method, "tuner": {"type": "full"}, "training": training, "checkpoint": {"saveSteps": steps}}
    return timed(config(base, data, folder / "out", **fixed, **side.block), folder)


def theirs(side: Side, rows: list[Row], base: Path, made: Path, steps: int) -> Clock:
    """The library's."""
    forget()
    set_seed(42)
    args = {
        "output_dir": str(made / "bare"),
        "max_steps": steps,
        "per_device_train_batch_size": side.batch,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_steps": steps,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = side.trainer(Bare(base, made, [each for row in rows for each in side.theirs(row)], args))
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock


def compare(method: str, base: Path, root: Path, steps: int, rounds: int) -> dict[str, float]:
    """Steps/s of both, and the ratios; the medians of all rounds."""
    side, draw = SIDES[method], random.Random(1)  # noqa: S311 - the same each time
    rows = [side.ours(draw) for _ in range(max(64, side.batch * 8))]
    clocks: dict[str, list[Clock]] = {"ours": [], "bare": []}
    # The first of each pays for what is imported and laid out once, and is not counted.
    for number in range(rounds + 1):
        folder = root / method / str(number)
        pair = ours(method, side, rows, base, folder, steps), theirs(side, rows, base, folder, steps)
        if number:
            clocks["ours"].append(pair[0])
            clocks["bare"].append(pair[1])
    wall = {name: statistics.median(each.wall for each in found) for name, found in clocks.items()}
    processor = {name: statistics.median(each.processor for each in found) for name, found in clocks.items()}
    return {
        "ours": steps / wall["ours"],
        "bare": steps / wall["bare"],
        "ratio": wall["bare"] / wall["ours"],
        "processor": processor["bare"] / processor["ours"],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(SIDES)}; all by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if unknown := set(options.methods) - set(SIDES):
        parser.error(f"no trainer to hold {', '.join(sorted(unknown))} against; there are {', '.join(SIDES)}")
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-methods-") as name:
        root = Path(name)
        workplace.prepare(root / "place", hub=False)
        base = tiny(root / "base")
        for method in options.methods or SIDES:
            found[method] = each = compare(method, base, root, options.steps, options.rounds)
            if not options.json:
                print(
                    f"{method:24}{each['ours']:7.2f} steps/s   bare {each['bare']:7.2f}   {each['ratio']:7.1%}"
                    f"   of processor time {each['processor']:7.1%}   (want >= 98 %)",
                    flush=True,
                )
    if options.json:
        print(json.dumps(found))
    elif not options.methods:
        for method, why in ALONE.items():
            print(f"{method:24}not compared: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
