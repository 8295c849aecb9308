"""One evaluation from questions to figures: answered by all processes, scored and published by the first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from trimtab_api.contract import RunConfig
from trimtab_api.v1alpha1.status import Predictions
from trimtab_trainer.distributed import Group, once
from trimtab_trainer.evaluation import answering, predictions, scores
from trimtab_trainer.evaluation.questions import Question
from trimtab_trainer.methods.vision import Sight
from trimtab_trainer.notice import Notice
from trimtab_trainer.output import Output, publish
from trimtab_trainer.rollout.engine import OwnModel, Sampling
from trimtab_trainer.rollout.fit import see_fits

PREFIX = "eval_"
"""Begins the names of figures in the history, as it does those of all that is measured on validation rows."""
LONGEST = "evaluation.generate.maxNewTokens"


@dataclass(frozen=True)
class Surroundings:
    """What an evaluation works with."""

    config: RunConfig
    group: Group
    notice: Notice
    output: Output
    tokenizer: Any
    stops: Sequence[int]
    """Ids of the tokens that end an answer."""
    made_by: dict[str, Any]
    """The account that manifests give."""
    folder: Path
    """Scratch space."""
    splits_weights: bool
    """Whether no process holds the weights whole."""
    look: Sight = dict
    """How prompts are looked at that show something."""
    never: Sequence[int] = ()
    """Tokens that an answer has none of."""


class Evaluator:
    """Asks the model all questions, as often as it is called. Every process has one, and they call it together.

    Raises Fault(SpecInvalid) when prompts and answers do not fit the model.
    """

    def __init__(self, around: Surroundings, questions: Sequence[Question], trainer: Any, tell: Tell):
        asked = around.config.spec.evaluation
        assert asked is not None, "there is no evaluator otherwise"
        self._around = around
        self._asked = asked
        self._questions = questions
        self._trainer = trainer
        self._tell = tell
        generate = asked.generate
        see_fits(trainer.model, max(len(each.prompt) for each in questions), generate.max_new_tokens, LONGEST)
        self._sampling = Sampling(
            longest=generate.max_new_tokens,
            temperature=generate.temperature,
            stops=around.stops,
            pad=around.tokenizer.pad_token_id,
            top_p=generate.top_p,
            never=around.never,
        )

    def __call__(self, step: int, model: Any = None) -> Predictions:
        """Answer, score, publish, and log the figures.

        `model`: who is asked, if not the trainer's model as it is wrapped. Raises Fault(Preempted) when told to leave
        meanwhile.
        """
        around, trainer = self._around, self._trainer
        engine = OwnModel(trainer, self._sampling, around.look, model, together=around.splits_weights)
        seed, total = self._asked.generate.seed, len(self._questions)
        answers = answering.answer(
            engine,
            self._questions,
            batch_size(around.config),
            seed,
            around.group,
            around.notice,
            lambda done: self._tell(trainer.state, done, total),
        )
        published, figures = once(around.group, lambda: self._publish(answers, step))
        # Not by way of the method's trainer: it would add what it has measured since its last line.
        Trainer.log(trainer, {PREFIX + name: round(value, 6) for name, value in figures.items()})
        return published

    def _publish(self, answers: answering.Answers, step: int) -> tuple[Predictions, dict[str, float]]:
        around = self._around
        found = [
            predictions.prediction(each, answers.tokens[each.row], around.tokenizer, around.stops)
            for each in self._questions
        ]
        said, references = [each.said() for each in found], [each.question.reference for each in found]
        scored = scores.score(self._asked.metrics, said, references, self._sampling.longest)
        folder, prefix = around.folder / f"{step}", around.output.layout.predictions(step)
        shutil.rmtree(folder, ignore_errors=True)
        predictions.write(found, scored, self._asked, step, folder)
        manifest = publish(around.output, folder, prefix, {**around.made_by, "step": step})
        place = Predictions(uri=prefix, digest=manifest.digest, rows=len(found))
        return place, predictions.figures(found, scored)


Tell = Callable[[Any, int, int], None]
"""Told the trainer's state, how many questions are answered, and how many there are."""


class AtStart(TrainerCallback):
    """Asks the model before its first step. The figures are in the history: a run that goes on does not ask again."""

    def __init__(self) -> None:
        self.evaluator: Evaluator | None = None
        """Set once the trainer exists; None asks nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every process is here, and its model as it will be trained."""
        if self.evaluator is not None and state.global_step == 0:
            self.evaluator(0)


def batch_size(config: RunConfig) -> int:
    """Prompts that a process answers at once: lowered as the rows of a pass are when memory has run out."""
    assert config.spec.evaluation is not None, "nothing is asked otherwise"
    asked = config.spec.evaluation.generate.batch_size
    lowered = asked * config.resolved.per_device_batch_size // config.spec.training.per_device_batch_size
    return max(1, lowered)
