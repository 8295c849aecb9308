"""Every model and every file of Python that a FineTuneJob names, by field: one list for whoever waits for them and
whoever opens them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.source import ModelSource, PythonFile
from trimtab_api.v1alpha1.status import ArtifactKind

MODEL = "model.from"
TOKENIZER = "model.scratch.tokenizer.from"
CONTINUED = "tuner.continueFrom"
DPO_REFERENCE = "dpo.refModel"
PPO_REWARD = "ppo.rewardModel.from"
GKD_TEACHER = "gkd.teacher.from"

SAME_VOCABULARY = frozenset({DPO_REFERENCE, GKD_TEACHER})
"""Fields of further models that are asked about the tuned model's own tokens."""

JUDGES: tuple[ArtifactKind, ...] = ("classifier", "adapter")
"""What may give rewards: an adapter too, when it brings the head."""

OWN_KIND: Mapping[str, tuple[ArtifactKind, ...]] = {
    "rewardModel": ("classifier",),
    "sequenceClassification": ("classifier",),
    "reranker": ("classifier",),
    "embedding": ("embedder",),
}
"""What a method may start from beside a language model: what it makes itself."""


@dataclass(frozen=True)
class Named:
    """A model that a field names."""

    field: str
    """Path of the field below spec."""
    source: ModelSource
    """Where it is."""
    kinds: tuple[ArtifactKind, ...] = ("model",)
    """What may lie there."""


def named(spec: FineTuneJobSpec) -> Iterator[Named]:
    """The model, the tokenizer of one from scratch, and the further ones."""
    if spec.model.from_ is not None:
        yield Named(MODEL, spec.model.from_, kinds=("model", *OWN_KIND.get(spec.method, ())))
    if spec.model.scratch is not None and spec.model.scratch.tokenizer.from_ is not None:
        yield Named(TOKENIZER, spec.model.scratch.tokenizer.from_)
    yield from further(spec)


def further(spec: FineTuneJobSpec) -> Iterator[Named]:
    """The models beside the one that is tuned: adapters, references, teachers, rewards."""
    yield from adapters(spec)
    if spec.dpo is not None and spec.dpo.ref_model is not None:
        yield Named(DPO_REFERENCE, spec.dpo.ref_model)
    if spec.grpo is not None:
        for number, reward in enumerate(spec.grpo.rewards):
            if reward.reward_model is not None:
                yield Named(grpo_reward(number), reward.reward_model.from_, kinds=JUDGES)
    if spec.ppo is not None:
        yield Named(PPO_REWARD, spec.ppo.reward_model.from_, kinds=JUDGES)
    if spec.gkd is not None:
        yield Named(GKD_TEACHER, spec.gkd.teacher.from_)


def adapters(spec: FineTuneJobSpec) -> Iterator[Named]:
    """The adapters on the tuned model that training begins with; they stand on its base, not on one of their own."""
    if spec.tuner.continue_from is not None:
        yield Named(CONTINUED, spec.tuner.continue_from, kinds=("adapter",))
    for number, lower in enumerate(spec.tuner.adapters or ()):
        yield Named(lower_adapter(number), lower.from_, kinds=("adapter",))


def lower_adapter(number: int) -> str:
    """The field that names an adapter which the base takes in."""
    return f"tuner.adapters[{number}].from"


def grpo_reward(number: int) -> str:
    """The field of the reward model of a grpo job's reward `number`, from 0."""
    return f"grpo.rewards[{number}].rewardModel.from"


@dataclass(frozen=True)
class Code:
    """A file of Python that a field names."""

    field: str
    """Path of the field below spec."""
    file: PythonFile
    """Where it is."""

    @property
    def reference(self) -> str:
        """How it is written down: configMap://NAME/KEY."""
        return f"configMap://{self.file.name}/{self.file.key}"


def code(spec: FineTuneJobSpec) -> Iterator[Code]:
    """The files of Python that a job runs."""
    for number, reward in enumerate(spec.grpo.rewards if spec.grpo is not None else ()):
        if reward.python is not None:
            yield Code(written_reward(number), reward.python.config_map_key_ref)


def written_reward(number: int) -> str:
    """The field of a grpo job's reward `number`, from 0, that is a function of the user's."""
    return f"grpo.rewards[{number}].python"


def gives_rewards(field: str) -> bool:
    """Whether what this field names judges answers."""
    return field == PPO_REWARD or field.startswith("grpo.rewards[")
