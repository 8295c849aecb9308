"""Generalised knowledge distillation: a round is one step, on rows or on the student's own answers.

Which of the two, seed and step decide alone: all processes agree without a word, and so does a run that goes on.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from trimtab_api import inputs
from trimtab_api.v1alpha1.rollout import Gkd
from trimtab_trainer import strategies
from trimtab_trainer.arguments import common, precision
from trimtab_trainer.data.prompts import ANSWER, PROMPT
from trimtab_trainer.methods.gkd import knobs
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import sight, unsayable
from trimtab_trainer.model import loading
from trimtab_trainer.model.vision import see_senses
from trimtab_trainer.rollout import divergence
from trimtab_trainer.rollout.beside import asking
from trimtab_trainer.rollout.engine import Sampling, pad_left, pad_right
from trimtab_trainer.rollout.fit import see_room
from trimtab_trainer.rollout.rounds import Record, RoundArguments, RoundTrainer, Tensors
from trimtab_trainer.strategies import beside


class DistillingTrainer(RoundTrainer):
    """Learns from a teacher's distributions."""

    def __init__(self, asked: Gkd, teacher: Any, **parts: Any):
        args = parts["args"]
        passes = args.gradient_accumulation_steps
        super().__init__(passes=passes, rows=passes * args.per_device_train_batch_size, **parts)
        self._asked = asked
        self._teacher = beside.laid_out(teacher, args, self.accelerator)

    def play(self, records: list[Record]) -> Tensors:
        """The step's sequences, and its number of learnt tokens in all processes."""
        own = self._speaks()
        sequences = self._sequences(records, own)
        mask = sequences["answer"].float()
        rows = torch.tensor(float(len(records)), device=mask.device)
        self.measure(on_policy=(rows * own, rows), answer_length=(mask, rows))
        return {
            **sequences,
            "tokens": self.total(mask.sum()),
            "own": torch.tensor(own, device=mask.device),
        }

    def _speaks(self) -> bool:
        """Whether the student answers in this round."""
        draw = random.Random(f"{self.args.seed} {self.round}").random()  # noqa: S311 - a draw that must come again
        return draw < self._asked.lmbda

    def _sequences(self, records: list[Record], own: bool) -> Tensors:
        prompts = [record[PROMPT] for record in records]
        answers = self.engine.generate(prompts).answers if own else [record[ANSWER] for record in records]
        before, before_mask = pad_left(prompts, self.sampling.pad, self.args.device)
        after, after_mask = pad_right(answers, self.sampling.pad, self.args.device)
        return {
            "ids": torch.cat([before, after], dim=1),
            "attention": torch.cat([before_mask, after_mask], dim=1),
            "answer": after_mask,
        }

    def part(self, played: Tensors, place: int) -> Tensors:
        """The rows of one pass."""
        size = self.args.per_device_train_batch_size
        rows = slice(place * size, (place + 1) * size)
        whole = ("tokens", "own")
        return {name: value if name in whole else value[rows] for name, value in played.items()}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean divergence over the step's tokens; in steps on rows with a share of the rows' own loss."""
        self.tokens_seen += inputs["attention"].sum().to(self.tokens_seen.device)
        distance, likelihood = self._distance(model, inputs)
        self.measure(divergence=(distance, inputs["answer"]))
        loss = distance
        if self._asked.sft_alpha:
            loss = loss + self._asked.sft_alpha * likelihood * ~inputs["own"]
        # The processes' gradients are averaged, and the count is over all of them.
        return loss * self.accelerator.num_processes / inputs["tokens"].clamp(min=1)

    def _distance(self, model: Any, sequences: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over the answers' tokens: the divergence from the teacher, and the negative log-likelihood."""
        asked, keep = self._asked, sequences["answer"].shape[1]
        batch = self.look({"input_ids": sequences["ids"], "attention_mask": sequences["attention"]})
        seen = {**batch, "logits_to_keep": keep + 1}
        student = model(**seen).logits[:, :-1]
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self._teacher(**seen).logits[:, :-1]
        # Families pad their vocabulary to different sizes; the tokens that there are come first in all of them.
        known = min(student.shape[-1], teacher.shape[-1])
        picked = sequences["answer"].bool()
        student, teacher = student[picked][:, :known], teacher[picked][:, :known]
        distance = divergence.summed(student, teacher, asked.beta, asked.temperature)
        if not asked.sft_alpha:
            return distance, distance.new_zeros(())
        wanted = sequences["ids"][:, -keep:][picked]
        return distance, torch.nn.functional.cross_entropy(student.float(), wanted, reduction="sum")

    def examine(self, model: Any, records: list[Record]) -> torch.Tensor:
        """The mean divergence on rows; of prompts alone, on the student's own answers."""
        own = not all(record[ANSWER] for record in records)
        sequences = self._sequences(records, own)
        distance, _ = self._distance(model, sequences)
        self.measure(divergence=(distance, sequences["answer"]))
        return distance / sequences["answer"].sum().clamp(min=1)


def distilling(parts: Parts) -> DistillingTrainer:
    """The trainer of gkd.

    Raises Fault(SpecInvalid) when prompts and answers do not fit into the model, Fault(ModelInvalid) when the teacher
    does not open.
    """
    asked = knobs(parts.config)
    if asked.lmbda > 0:
        see_room(parts, asked.max_completion_length, "gkd.maxCompletionLength")
    dtype = getattr(torch, precision(parts.config))
    how = strategies.of(parts.config).loading()
    teacher = loading.load(parts.further[inputs.GKD_TEACHER], inputs.GKD_TEACHER, dtype, **how)
    loading.see_vocabulary(teacher, parts.tokenizer, inputs.GKD_TEACHER)
    if parts.media is not None:
        named = parts.further[inputs.GKD_TEACHER]
        see_senses(named.path, parts.media.kinds, f"{inputs.GKD_TEACHER} {named.reference}: ")
    return DistillingTrainer(
        asked=asked,
        teacher=teacher.eval().requires_grad_(False),
        look=sight(parts),
        asking=asking(parts),
        sampling=Sampling(
            longest=asked.max_completion_length,
            temperature=asked.temperature,
            stops=parts.stops,
            pad=parts.tokenizer.pad_token_id,
            never=unsayable(parts),
        ),
        model=parts.model,
        args=RoundArguments(**common(parts.config, parts.folder, validated=parts.validation is not None)),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=parts.callbacks,
    )
