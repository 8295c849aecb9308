"""TRL's GRPOTrainer over prompts that are already tokens, with the room's engine and our rewards.

The loss, the advantages and the metrics are the library's. Ours are the tokens, the drawing, the order of prompts
(which a run that goes on finds again in every epoch), and what is held between steps.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trimtab_api import inputs
from trimtab_api.v1alpha1.rollout import Grpo
from trimtab_trainer import rewards
from trimtab_trainer.arguments import UnnumberedCpu, common
from trimtab_trainer.data.prompts import ROW, read_row
from trimtab_trainer.inputs import Pins
from trimtab_trainer.methods.grpo import knobs
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import Sight, sight, unsayable
from trimtab_trainer.rewards import Reward, Said, written
from trimtab_trainer.rewards.judged import Judged
from trimtab_trainer.rewards.written import Written
from trimtab_trainer.rollout.beside import Asking, asking
from trimtab_trainer.rollout.engine import Engine, OwnModel, Sampling
from trimtab_trainer.rollout.fit import see_room
from trimtab_trainer.rollout.holding import Holding
from trimtab_trainer.rollout.order import InOrder, Rounds
from trimtab_trainer.rollout.reference import Referring, is_adapted, keep_adapter, second
from trimtab_trainer.strategies import beside

LOSSES = {"drGrpo": "dr_grpo"}
"""Loss types whose name the library writes otherwise."""


class GroupedArguments(UnnumberedCpu, GRPOConfig):
    """GRPOConfig for runs on any device."""


class GroupedTrainer(Referring, Observed, Holding, GRPOTrainer):
    """GRPOTrainer that asks the room's engine."""

    def __init__(
        self,
        engine: Sampling,
        asking: Asking,
        order: InOrder,
        look: Sight,
        beta: float,
        reference: Any,
        **parts: Any,
    ):
        super().__init__(**parts)
        # Its arguments say 0: the library would open a reference that is whole with some strategies.
        self.beta = beta
        self.ref_model = None if reference is None else beside.laid_out(reference, self.args, self.accelerator)
        self._order = order
        self._look = look
        self.engine: Engine = asking(self, engine, look)
        # Another engine's arithmetic draws from a slightly other distribution: the library weighs tokens by the ratio
        # of the two. Its own engine, which the same word in its arguments would start, is never asked.
        self.use_vllm = not isinstance(self.engine, OwnModel)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *_: Any, **__: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        spoken = self.engine.generate(prompt_ids)
        return spoken.answers, spoken.log_probs

    def _get_per_token_logps_and_entropies(self, model: Any, *asked: Any, **how: Any) -> Any:
        """The library's, of a model that is shown what the ids say."""

        def seeing(input_ids: torch.Tensor, **more: Any) -> Any:
            return model(**self._look({"input_ids": input_ids}), **more)

        return super()._get_per_token_logps_and_entropies(seeing, *asked, **how)

    def _get_train_sampler(self, dataset: Any = None) -> Rounds:
        args: Any = self.args
        self._order.rounds = Rounds(
            rows=len(self.train_dataset if dataset is None else dataset),
            prompts=args.generation_batch_size // self.num_generations,
            copies=self.num_generations,
            repeats=self.num_iterations * args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=args.data_seed,
        )
        return self._order.rounds

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The library's loss; the tokens of prompts and answers are counted on the way."""
        if model.training:
            seen = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
            self.tokens_seen += seen.to(self.tokens_seen.device)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def held(self) -> dict[str, Any]:
        """The place in the round, and its answers while steps with them remain."""
        args: Any = self.args
        remains = self._step % (args.steps_per_generation * self.num_iterations)
        return {
            "step": self._step,
            "round": self._buffered_inputs if remains else None,
        }

    def hold(self, held: dict[str, Any]) -> None:
        """See Holding."""
        device = self.args.device
        self._step = held["step"]
        self._buffered_inputs = held["round"] and [
            {name: value.to(device) for name, value in part.items()} for part in held["round"]
        ]


class Asked:
    """A reward in the form in which the library asks for it."""

    def __init__(self, name: str, reward: Reward):
        self.__name__ = name
        self._reward = reward

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        """One number for each answer of this process."""
        rows = [read_row({ROW: row}) for row in columns[ROW]]
        answers = zip(rows, completions, completion_ids, strict=True)
        said = [Said(row.messages, text, ids, row.columns, row.place) for row, text, ids in answers]
        return list(self._reward(said))


def grouped(parts: Parts) -> GroupedTrainer:
    """The trainer of grpo. Raises Fault(SpecInvalid) when prompts and answers do not fit into the model."""
    asked = knobs(parts.config)
    see_room(parts, asked.max_completion_length, "grpo.maxCompletionLength")
    order, reference = InOrder(), _reference(parts, asked)
    args = _arguments(parts, asked)
    return GroupedTrainer(
        engine=Sampling(
            longest=asked.max_completion_length,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stops=parts.stops,
            pad=parts.tokenizer.pad_token_id,
            never=unsayable(parts),
        ),
        asking=asking(parts),
        order=order,
        look=sight(parts),
        beta=asked.beta,
        reference=reference,
        model=parts.model,
        args=args,
        reward_funcs=_rewards(parts, asked, args.device),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=[order, *parts.callbacks],
    )


def _arguments(parts: Parts, asked: Grpo) -> GroupedArguments:
    return GroupedArguments(
        **common(parts.config, parts.folder, validated=parts.validation is not None),
        num_generations=asked.num_generations,
        num_generations_eval=1,
        max_completion_length=asked.max_completion_length,
        temperature=asked.temperature,
        top_p=asked.top_p,
        beta=0,
        loss_type=LOSSES.get(asked.loss_type, asked.loss_type),
        epsilon=asked.epsilon,
        epsilon_high=asked.epsilon_high,
        importance_sampling_level=asked.importance_sampling,
        scale_rewards=asked.scale_rewards,
        num_iterations=asked.num_iterations,
        # Ratios of whole answers would fall to nothing with topP, which makes each token a little likelier.
        vllm_importance_sampling_mode="token_truncate",
        reward_weights=[1.0 if reward.weight is None else reward.weight for reward in asked.rewards],
        shuffle_dataset=parts.config.spec.dataset.shuffle,
        # The ratio of new to old probability must be the update's doing, not the dropout's.
        disable_dropout=True,
    )


def _reference(parts: Parts, asked: Grpo) -> Any:
    """The second model, with the head by which the library asks it; None where an adapter has its copy."""
    if not asked.beta:
        return None
    if is_adapted(parts.model):
        keep_adapter(parts.model)
        return None
    found = second(parts)
    add_fused_lm_head(found, temperature=asked.temperature)
    return found


def _rewards(parts: Parts, asked: Grpo, device: Any) -> list[Any]:
    found: list[Asked] = []
    for number, reward in enumerate(asked.rewards):
        does: Reward
        name: str = reward.name or "rewardModel"
        if reward.name is not None:
            does = rewards.by_name(reward.name, asked.max_completion_length)
        elif reward.python is not None:
            name = reward.python.function
            does = Written.open(written.code_of(parts.config, number), name, Pins(parts.config.pins))
        else:
            field = inputs.grpo_reward(number)
            with beside.whole():
                does = Judged.open(parts.further[field], field, torch.float32, device)
        taken = name in {each.__name__ for each in found}
        found.append(Asked(f"{name}{number}" if taken else name, does))
    return list(found)
