"""A trainer that works in rounds: the model answers some prompts, and several forward passes learn from the answers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from trimtab_trainer.arguments import UnnumberedCpu
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.vision import Sight
from trimtab_trainer.rollout.beside import Asking
from trimtab_trainer.rollout.engine import Engine, OwnModel, Sampling
from trimtab_trainer.rollout.holding import Holding
from trimtab_trainer.rollout.order import InOrder, Rounds

Record = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class RoundArguments(UnnumberedCpu, TrainingArguments):
    """TrainingArguments for runs on any device."""


class RoundTrainer(Observed, Holding, Trainer):
    """What methods that work in rounds share.

    `passes` forward passes make a round, from `rows` prompts of each process. A method says what a round holds
    (`play`), what of it a pass learns from (`part`), its loss, and how a batch is examined for evaluation (`examine`).
    Losses are means over the tokens of a whole step of all processes: how it is cut into passes does not matter.
    """

    def __init__(
        self,
        sampling: Sampling,
        passes: int,
        rows: int,
        look: Sight = dict,
        asking: Asking = OwnModel,
        **parts: Any,
    ):
        self._in_order = InOrder()
        parts["callbacks"] = [self._in_order, *parts.pop("callbacks", [])]
        super().__init__(data_collator=list, **parts)
        # Whatever is not None keeps transformers from dividing a loss that is already one of the whole step.
        self.model_accepts_loss_kwargs = False
        self.compute_loss_func = self.compute_loss
        self.sampling = sampling
        self.look = look
        self.engine: Engine = asking(self, sampling, look)
        self.passes = passes
        self.rows = rows
        self.played: Tensors | None = None
        self._pass = 0
        self._measured: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def play(self, records: list[Record]) -> Tensors:
        """One round with these prompts."""
        raise NotImplementedError

    def part(self, played: Tensors, place: int) -> Tensors:
        """What pass `place` of the round learns from."""
        raise NotImplementedError

    def examine(self, model: Any, records: list[Record]) -> torch.Tensor:
        """The loss of some records, for evaluation."""
        raise NotImplementedError

    @property
    def round(self) -> int:
        """Number of the round, from 0."""
        return self._pass // self.passes

    def get_train_dataloader(self) -> Any:
        """The prompts of whole rounds: each round comes once for every pass."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.rows,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Any = None) -> Rounds:
        args: Any = self.args
        self._in_order.rounds = Rounds(
            rows=len(self.train_dataset if dataset is None else dataset),
            prompts=self.rows * args.world_size,
            copies=1,
            repeats=self.passes,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.data_seed,
        )
        return self._in_order.rounds

    def _prepare_inputs(self, inputs: Any) -> Any:
        place = self._pass % self.passes
        if place == 0 or self.played is None:
            self.played = self.play(inputs)
        found = self.part(self.played, place)
        self._pass += 1
        return found

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of a batch of records."""
        with torch.no_grad():
            return self.examine(model, inputs).detach(), None, None

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        summed: torch.Tensor = self.accelerator.reduce(numbers.detach().float(), reduction="sum")
        return summed

    def measure(self, **sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Note means for the next log line, each as a sum and a count of this process."""
        pairs = [torch.stack([each.detach().float().sum() for each in pair]) for pair in sums.values()]
        mode = "train" if self.model.training else "eval"
        for name, (summed, count) in zip(sums, self.total(torch.stack(pairs)).tolist(), strict=True):
            self._measured[mode][name].append(summed / max(count, 1.0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A log line, with the means of what was measured since the last."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        found = self._measured[mode]
        super().log({**logs, **{prefix + name: sum(each) / len(each) for name, each in found.items()}}, start_time)
        found.clear()

    def held(self) -> dict[str, Any]:
        """The place in the round, its answers while passes with them remain, and the measures since the last log."""
        return {
            "pass": self._pass,
            "played": self.played if self._pass % self.passes else None,
            "measured": {name: list(values) for name, values in self._measured["train"].items()},
        }

    def hold(self, held: dict[str, Any]) -> None:
        """See Holding."""
        device = self.args.device
        self._pass = held["pass"]
        self.played = held["played"] and {name: value.to(device) for name, value in held["played"].items()}
        self._measured["train"].update(held["measured"])
