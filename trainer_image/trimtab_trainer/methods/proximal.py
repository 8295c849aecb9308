"""Proximal policy optimisation with a value head on the tuned model's own backbone.

A second network for values would be one more model in memory with an optimiser of its own, and would have to be split,
saved and resumed like the first. A head of one row on the backbone costs nothing, is a part of the model for every
strategy, and is warm after a few rounds; that its loss moves the backbone as well is what vfCoef keeps small.
The head is in every checkpoint, and in no artifact.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from trimtab_api import inputs
from trimtab_api.v1alpha1.rollout import Ppo
from trimtab_trainer.arguments import common
from trimtab_trainer.data.prompts import PROMPT, read_row
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.ppo import knobs
from trimtab_trainer.rewards import Reward, Said
from trimtab_trainer.rewards.judged import Judged
from trimtab_trainer.rollout import advantages
from trimtab_trainer.rollout.beside import asking
from trimtab_trainer.rollout.engine import VALUE_HEAD as HEAD
from trimtab_trainer.rollout.engine import Sampling, pad_left, pad_right
from trimtab_trainer.rollout.fit import see_room
from trimtab_trainer.rollout.reference import Reference, Referring, is_adapted, second
from trimtab_trainer.rollout.rounds import Record, RoundArguments, RoundTrainer, Tensors
from trimtab_trainer.strategies import beside, gathering


def add_value_head(model: Any) -> None:
    """Give a causal model a head of one row, all zeros: no value is expected before one was seen.

    `model(..., fused_values=True)` then returns log_probs and values [rows, tokens - 1]: of token t + 1, and of what
    stands before it. The model must have the library's fused language head.
    """
    inner = inner_of(model)
    width = inner.config.get_text_config().hidden_size
    # As wide as all that is trained: DeepSpeed steps on weights of one width alone.
    dtype = next(weight.dtype for weight in model.parameters() if weight.requires_grad)
    head = torch.nn.Linear(width, 1, dtype=dtype, device=inner.get_output_embeddings().weight.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    inner.add_module(HEAD, head)
    plain = inner.forward

    @functools.wraps(plain)
    def forward(*args: Any, fused_values: bool = False, **keywords: Any) -> Any:
        if not fused_values:
            return plain(*args, **keywords)
        states: list[torch.Tensor] = []
        hook = inner.base_model.register_forward_hook(lambda _m, _i, out: states.append(out.last_hidden_state))
        try:
            out = plain(*args, fused_lm_head=True, **keywords)
        finally:
            hook.remove()
        head = getattr(inner, HEAD)
        values = head(states[0][:, :-1].to(head.weight.dtype)).squeeze(-1).float()
        return {"log_probs": out.log_probs, "values": values}

    inner.forward = forward


def remove_value_head(model: Any) -> None:
    """Leave the model as it is published."""
    inner = inner_of(model)
    if hasattr(inner, HEAD):
        delattr(inner, HEAD)


def inner_of(model: Any) -> Any:
    """The causal model within its adapter."""
    return model.get_base_model() if is_adapted(model) else model


class ProximalTrainer(Referring, RoundTrainer):
    """A round is num_mini_batches steps' worth of prompts; its passes go over it `epochs` times in changing orders."""

    def __init__(self, asked: Ppo, judge: Reward, reference: Reference, **parts: Any):
        args = parts["args"]
        steps = asked.num_mini_batches
        step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        passes = asked.epochs * steps * args.gradient_accumulation_steps
        super().__init__(passes=passes, rows=steps * step_rows, **parts)
        self._asked = asked
        self._judge = judge
        self._reference = reference
        if reference.second is not None:
            reference.second = beside.laid_out(reference.second, args, self.accelerator)

    # ------------------------------------------------------------ a round

    def play(self, records: list[Record]) -> Tensors:
        """Answers with everything that stays fixed while they are learnt from."""
        asked = self._asked
        answers, scores = self._answer(records)
        sequences = self._padded([record[PROMPT] for record in records], answers)
        mask = sequences["answer"].float()
        old, values, reference = self._look(sequences)
        rewards = advantages.token_rewards(scores, old, reference, mask, asked.kl_coef)
        if asked.whiten_rewards:
            rewards = advantages.whiten(rewards, mask, self.total, centre=False)
        found, returns = advantages.estimate(rewards, values, mask, asked.gamma, asked.lam)
        rows = torch.tensor(float(len(records)), device=mask.device)
        self.measure(
            reward=(scores, rows),
            kl=((old - reference) * mask, rows),
            value=(values * mask, mask),
            answer_length=(mask, rows),
            answers_ended=(sequences["ended"], rows),
        )
        order = torch.stack([torch.randperm(len(records)) for _ in range(asked.epochs)])
        return {
            **sequences,
            "old": old,
            "values": values,
            "returns": returns,
            "advantages": advantages.whiten(found, mask, self.total),
            "order": order,
            "tokens": self._tokens(mask, order),
        }

    def _answer(self, records: list[Record]) -> tuple[list[list[int]], torch.Tensor]:
        """What the model says, and what it earns [rows]."""
        spoken = self.engine.generate([record[PROMPT] for record in records]).answers
        tokenizer: Any = self.processing_class
        texts = tokenizer.batch_decode(spoken, skip_special_tokens=True)
        said = []
        for record, text, ids in zip(records, texts, spoken, strict=True):
            row = read_row(record)
            said.append(Said(row.messages, text, ids, row.columns, row.place))
        scores = torch.tensor(self._judge(said), dtype=torch.float32, device=self.args.device)
        if self._asked.missing_eos_penalty is not None:
            scores = scores - self._asked.missing_eos_penalty * (1 - self._ended(spoken))
        return spoken, scores

    def _ended(self, answers: list[list[int]]) -> torch.Tensor:
        stops = set(self.sampling.stops)
        return torch.tensor([float(ids[-1] in stops) for ids in answers], device=self.args.device)

    def _padded(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensors:
        pad = self.sampling.pad
        before, before_mask = pad_left(prompts, pad, self.args.device)
        after, after_mask = pad_right(answers, pad, self.args.device)
        return {
            "ids": torch.cat([before, after], dim=1),
            "attention": torch.cat([before_mask, after_mask], dim=1),
            "answer": after_mask,
            "ended": self._ended(answers),
        }

    def _look(self, sequences: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and values now, and log-probabilities at the start, [rows, tokens] each."""
        model: Any = self.model
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        size = self.args.per_device_train_batch_size
        with torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(sequences["ids"]), size):
                some = {name: value[start : start + size] for name, value in sequences.items()}
                now = self._ask(model, some, fused_values=True)
                with self._reference.of(model) as frozen:
                    before = self._ask(frozen, some, fused_lm_head=True)
                keep = some["answer"].shape[1]
                found.append((now["log_probs"][:, -keep:], now["values"][:, -keep:], before["log_probs"][:, -keep:]))
        old, values, reference = (torch.cat(each) for each in zip(*found, strict=True))
        mask = sequences["answer"]
        return old.float() * mask, values.float() * mask, reference.float() * mask

    @staticmethod
    def _ask(model: Any, sequences: Tensors, **how: bool) -> Any:
        labels = sequences["ids"].masked_fill(sequences["attention"] == 0, -100)
        labels[:, : -sequences["answer"].shape[1]] = -100
        return model(input_ids=sequences["ids"], attention_mask=sequences["attention"], labels=labels, **how)

    def _tokens(self, mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Tokens of all processes in each step of the round [epochs x steps]."""
        lengths = mask.sum(dim=1)[order.to(mask.device)]
        return self.total(lengths.reshape(self._asked.epochs * self._asked.num_mini_batches, -1).sum(dim=1))

    def part(self, played: Tensors, place: int) -> Tensors:
        """The rows of one pass."""
        size, passes = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        start = place * size
        rows = played["order"].reshape(-1)[start : start + size].to(played["ids"].device)
        picked = {name: value[rows] for name, value in played.items() if name not in ("order", "tokens")}
        return {**picked, "tokens": played["tokens"][place // passes]}

    # ------------------------------------------------------------ a pass

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The clipped losses of policy and values, each a mean over the tokens of the step."""
        asked, mask = self._asked, inputs["answer"].float()
        self.tokens_seen += inputs["attention"].sum().to(self.tokens_seen.device)
        keep = mask.shape[1]
        out = self._ask(model, inputs, fused_values=True)
        log_probs, values = out["log_probs"][:, -keep:], out["values"][:, -keep:]
        policy = advantages.policy_losses(log_probs, inputs["old"], inputs["advantages"], asked.cliprange) * mask
        value = advantages.value_losses(values, inputs["values"], inputs["returns"], asked.cliprange_value) * mask
        ratio = torch.exp(log_probs.detach() - inputs["old"])
        self.measure(
            policy_loss=(policy, mask),
            value_loss=(value, mask),
            clipped=(((ratio - 1).abs() > asked.cliprange) * mask, mask),
        )
        # The processes' gradients are averaged, and the count is over all of them.
        share = self.accelerator.num_processes / inputs["tokens"].clamp(min=1)
        return (policy.sum() + asked.vf_coef * value.sum()) * share

    def examine(self, model: Any, records: list[Record]) -> torch.Tensor:
        """The negated mean reward of one answer to each prompt."""
        _, scores = self._answer(records)
        self.measure(reward=(scores, torch.tensor(float(len(records)), device=scores.device)))
        return -scores.mean()

    # ------------------------------------------------------------ the head

    def held(self) -> dict[str, Any]:
        """What a round holds, and the head: beside an adapter a checkpoint keeps no other weights."""
        head = {name: gathering.whole(weight).cpu() for name, weight in self._head.named_parameters()}
        return {**super().held(), HEAD: head}

    def hold(self, held: dict[str, Any]) -> None:
        """See Holding."""
        super().hold(held)
        if self.is_deepspeed_enabled:  # its own checkpoint holds the head, and the optimiser's copy of it
            return
        for name, weight in self._head.named_parameters():
            gathering.put(weight, held[HEAD][name])

    @property
    def _head(self) -> Any:
        return getattr(inner_of(self.accelerator.unwrap_model(self.model)), HEAD)

    def published(self) -> Any:
        """The model without its value head."""
        model = super().published()
        remove_value_head(model)
        return model


def proximal(parts: Parts) -> ProximalTrainer:
    """The trainer of ppo. Raises Fault(SpecInvalid) when prompts and answers do not fit into the model."""
    asked, model = knobs(parts.config), parts.model
    see_room(parts, asked.response_length, "ppo.responseLength")
    # The ratio of new to old probability must be the update's doing, not the dropout's.
    disable_dropout_in_model(model)
    reference = Reference(model, second(parts))
    for each in (inner_of(model), reference.second):
        if each is not None:
            add_fused_lm_head(each, temperature=asked.temperature)
    add_value_head(model)
    args = RoundArguments(**common(parts.config, parts.folder, validated=parts.validation is not None))
    with beside.whole():
        judge = Judged.open(parts.further[inputs.PPO_REWARD], inputs.PPO_REWARD, torch.float32, args.device)
    return ProximalTrainer(
        asked=asked,
        judge=judge,
        reference=reference,
        asking=asking(parts),
        sampling=Sampling(
            longest=asked.response_length,
            temperature=asked.temperature,
            stops=parts.stops,
            pad=parts.tokenizer.pad_token_id,
        ),
        model=model,
        args=args,
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=parts.callbacks,
    )
