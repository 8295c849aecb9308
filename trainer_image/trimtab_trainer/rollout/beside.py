"""Answers drawn by vLLM in the trainer's own pod: it is told of the model once, and given what moved before a round.

Stale or wrong weights would be silently wrong, so the first answers of a round are held against the trainer's own
forward pass, in rounds 1, 2, 4, 8 and so on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from trimtab_api.conditions import Reason
from trimtab_api.contract import ROLLOUT_BASE, RolloutBase, RunConfig
from trimtab_trainer import workplace
from trimtab_trainer.arguments import precision
from trimtab_trainer.distributed import Group, each, once_per_pod
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import Sight
from trimtab_trainer.rollout.engine import Engine, OwnModel, Sampling, Spoken, TokenIds
from trimtab_trainer.rollout.handing import handing
from trimtab_trainer.rollout.wire import Answer, Wire

log = logging.getLogger(__name__)

READY_SECONDS = 1200.0
"""Longest time until the engine is ready."""
PATIENCE = 0.8
"""The part of distributed.timeoutSeconds that one process may let the others wait for the engine."""
IN_FLIGHT = 64
"""Answers that one process asks for at the same time."""
SEEN = 4
"""Answers of each process that are held against its own forward pass; one where weights are split."""
APART = {"float32": 0.005, "float16": 0.1, "bfloat16": 0.2}
"""Mean difference of a token's log-probability that two engines' arithmetic explains, at temperature 1."""

Asking = Callable[[Any, Sampling, Sight], Engine]
"""Makes the engine of a trainer."""


def asking(parts: Parts) -> Asking:
    """Who draws the answers of this job."""
    return partial(Beside, parts) if parts.config.spec.asks_vllm else OwnModel


class Beside:
    """See engine.Engine."""

    def __init__(self, parts: Parts, trainer: Any, sampling: Sampling, _look: Sight):
        self._config: RunConfig = parts.config
        self._group: Group = parts.group
        self._trainer = trainer
        self._sampling = sampling
        self._root = _root()
        self._wire = Wire(self._root, workplace.engine_port())
        dtype = getattr(torch, precision(parts.config))
        self._handing = handing(parts.model, self._root, self._wire, dtype)
        self._splits = parts.config.resolved.strategy in ("zero3", "fsdp2")
        self._followed: int | None = None
        """The step whose weights the engine has."""
        self._name = ""
        """What it calls them."""
        self._rounds = 0
        self._place: tuple[int, bool] | None = None
        self._drawn = 0
        """Draws before this one at the same step, of the same kind."""
        once_per_pod(self._group, partial(self._announce, parts))

    def generate(self, prompts: Sequence[TokenIds]) -> Spoken:
        """See Engine."""
        moved = self._follow()
        seeds = self._seeds(len(prompts))
        answers: list[Answer] = []

        def ask() -> None:
            with ThreadPoolExecutor(min(IN_FLIGHT, len(prompts))) as pool:
                answers.extend(pool.map(self._ask, prompts, seeds))

        each(self._group, ask)
        spoken = Spoken([answer.tokens for answer in answers], [answer.log_probs for answer in answers])
        if moved:
            self._rounds += 1
            if self._rounds & (self._rounds - 1) == 0:
                self._see(prompts, spoken)
        return spoken

    # ------------------------------------------------------------ the engine's weights

    def _announce(self, parts: Parts) -> None:
        """Tell the engine which model to open."""
        assert parts.base is not None, "the rules ask for a model that speaks"
        config = parts.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        longest = parts.config.spec.dataset.max_length + self._sampling.longest
        told = RolloutBase(
            path=str(parts.base.path),
            dtype=cast(Any, precision(parts.config)),
            max_model_len=min(longest, room) if isinstance(room, int) else longest,
            max_lora_rank=self._handing.rank,
        )
        draft = self._root / f".{ROLLOUT_BASE}"
        draft.write_text(json.dumps(told.dump()))
        draft.replace(self._root / ROLLOUT_BASE)

    def _follow(self) -> bool:
        """Give the engine the weights as they are now; whether it had others. All processes take part."""
        step = int(self._trainer.state.global_step)
        if step == self._followed:
            return False
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        weights = self._handing.gather(model, self._group.place.first_of_pod)
        self._name = once_per_pod(self._group, lambda: self._hand_over(model, weights, step))
        self._followed = step
        return True

    def _hand_over(self, model: Any, weights: dict[str, torch.Tensor], step: int) -> str:
        if self._followed is None:
            log.info("waiting for the engine")
            self._wire.await_ready(min(READY_SECONDS, PATIENCE * self._config.spec.distributed.timeout_seconds))
        self._handing.hand_over(model, weights, step)
        return self._handing.name

    # ------------------------------------------------------------ its answers

    def _seeds(self, rows: int) -> list[int]:
        """One for each row, by the job's seed, step and row: a run that goes on asks the same."""
        place = (int(self._trainer.state.global_step), bool(self._trainer.model.training))
        self._drawn = self._drawn + 1 if place == self._place else 0
        self._place = place
        told = f"{self._config.spec.training.seed} {place} {self._drawn} {self._group.place.rank}"
        return [int.from_bytes(hashlib.sha256(f"{told} {row}".encode()).digest()[:7], "big") for row in range(rows)]

    def _ask(self, prompt: TokenIds, seed: int) -> Answer:
        return self._wire.ask(
            {
                "model": self._name,
                "prompt": [int(token) for token in prompt],
                "max_tokens": self._sampling.longest,
                "temperature": self._sampling.temperature,
                "top_p": self._sampling.top_p,
                "seed": seed,
                # What ends an answer is ours to say, not the model's settings'.
                "ignore_eos": True,
                "stop_token_ids": list(self._sampling.stops),
                "return_token_ids": True,
                "logprobs": 0,
            }
        )

    def _see(self, prompts: Sequence[TokenIds], spoken: Spoken) -> None:
        """Raise Fault(AssertionFailed) when the engine's log-probabilities are not those of the trainer's weights."""
        assert spoken.log_probs is not None
        model, apart, tokens = self._trainer.model_wrapped, 0.0, 0
        training = model.training
        model.eval()
        for row in range(1 if self._splits else min(SEEN, len(prompts))):
            said = torch.tensor(spoken.log_probs[row])
            apart += beyond(self._own(model, prompts[row], spoken.answers[row]), said, self._sampling.top_p)
            tokens += len(said)
        model.train(training)
        measured = self._group.all_of((apart, tokens))
        mean = sum(found for found, _ in measured) / sum(count for _, count in measured)
        log.info("the engine's log-probabilities are %.2g from the trainer's, step %d", mean, self._followed)
        if not mean <= APART[precision(self._config)] / min(1.0, self._sampling.temperature):
            raise Fault(
                Reason.ASSERTION_FAILED,
                f"at step {self._followed} the engine's log-probabilities are {mean:.2g} a token from those of the "
                "model that is trained: it draws from other weights",
                "Set rollout.engine: transformers, or model.dtype: float32.",
                step=self._followed,
            )

    def _own(self, model: Any, prompt: TokenIds, answer: list[int]) -> torch.Tensor:
        """The trainer's log-probabilities of an answer [tokens], in main memory."""
        device = self._trainer.args.device
        ids = torch.tensor([[*prompt, *answer]], device=device)
        with torch.no_grad(), self._trainer.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        log_probs = torch.log_softmax(logits.float() / self._sampling.temperature, dim=-1)
        return log_probs.gather(1, torch.tensor(answer, device=device).unsqueeze(1)).squeeze(1).cpu()


def beyond(own: torch.Tensor, said: torch.Tensor, top_p: float) -> float:
    """How far log-probabilities [tokens] lie beyond what top-p explains, summed: it leaves out some tokens, so that
    those it keeps are up to -log(top_p) likelier."""
    higher = (said - own + math.log(top_p)).clamp(min=0)
    lower = (own - said).clamp(min=0)
    return float((higher + lower).sum())


def _root() -> Path:
    root = workplace.rollout_root()
    if not root.is_dir():
        raise Fault(
            Reason.SPEC_INVALID,
            "rollout.engine: vllm asks an engine beside the trainer, and none is here",
            "Set rollout.engine: transformers, or run the job in a cluster.",
        )
    return root
