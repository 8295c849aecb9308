"""The losses against the formulas of their papers, on the same tensors, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tests.unit.trainer.conftest import run_config
from tests.unit.trainer.preference.conftest import Judge, job, pairs
from trimtab_api.v1alpha1.preference import DpoLoss
from trimtab_trainer.data.preference import _pair
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.methods import METHODS
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.reference_free import ReferenceFreeTrainer
from trimtab_trainer.model import adapter, tokenizer
from trimtab_trainer.template import ChatTemplate

BETA = 0.3
EPSILON = 0.2


class Known:
    """A batch of pairs, and what policy and reference find of each token, from logits computed plainly."""

    def __init__(self, trainer: Any, reference: Any):
        rows = [trainer.train_dataset[index] for index in range(3)]
        self.batch = trainer.data_collator(rows)
        self.mask = self.batch["completion_mask"][:, 1:]
        self.policy = self._tokens(trainer.model)
        self.reference = self._tokens(reference)
        self.chosen, self.rejected = self.policy.sum(1).chunk(2)
        self.ref_chosen, self.ref_rejected = self.reference.sum(1).chunk(2)
        self.chosen_length, self.rejected_length = self.mask.sum(1).chunk(2)

    def _tokens(self, model: Any) -> Tensor:
        ids = self.batch["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=self.batch["attention_mask"]).logits
        return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * self.mask

    @property
    def good(self) -> Tensor:
        """log of policy over reference of the chosen answers."""
        return self.chosen - self.ref_chosen

    @property
    def bad(self) -> Tensor:
        """The same of the rejected ones."""
        return self.rejected - self.ref_rejected

    @property
    def h(self) -> Tensor:
        """Their difference."""
        return self.good - self.bad

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood per token of the chosen answers."""
        return -self.chosen.sum() / self.chosen_length.sum()


def _trainer(base: Path, tmp_path: Path, judge: Judge, method: str, tuner: str = "full", **fields: Any) -> Any:
    """A method's trainer on a model that has already moved away from the base."""
    spec = job(method, pairs(judge), tuner, steps={"perDeviceBatchSize": 3}, **fields)
    config = run_config(spec, tmp_path / "out", model=base)
    loaded = tokenizer.load(base, "base")
    render = ChatTemplate.of(tokenizer.own_template(loaded), None, None, {}).renderer()
    encoder = METHODS[method].encoder(config, loaded, render)
    # Answers of unlike lengths, so that means and sums, and the longer tail, are told apart.
    rows = [
        _pair({"rejected_response": f"{judge.rejected}{' and wait' * place}"}, {"messages": row["messages"]}, "rows", 1)
        for place, row in enumerate(pairs(judge, 4))
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if tuner == "lora":
        model = adapter.adapt(model, adapter.settings(spec), 1)
    parts = Parts(
        config=config,
        group=Group(Place(0, 0, 1, 1), 1, 60),
        model=model,
        tokenizer=loaded,
        template=None,
        stops=[0],
        train=Dataset.from_list(list(encoder.encode(rows))),
        validation=None,
        folder=tmp_path,
        callbacks=[],
        base=LocalModel(path=base, reference="base", digest=None),
    )
    trainer = METHODS[method].trainer(parts)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    return trainer


def _charged(trainer: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(batch)))


def _ipo(k: Known) -> Tensor:
    # Per token of the answers with what frames them, as the library counts them for ipo and sigmoidNorm.
    return (k.good / k.chosen_length - k.bad / k.rejected_length - 1 / (2 * BETA)) ** 2


def _exo(k: Known) -> Tensor:
    win = torch.sigmoid(BETA * k.h)
    won, lost = torch.tensor(1 - EPSILON).log(), torch.tensor(EPSILON).log()
    return win * (win.log() - won) + (1 - win) * ((1 - win).log() - lost)


def _smoothed(margin: Tensor) -> Tensor:
    return -(1 - EPSILON) * logsigmoid(BETA * margin) - EPSILON * logsigmoid(-BETA * margin)


def _discopop(k: Known) -> Tensor:
    x = BETA * k.h
    mix = torch.sigmoid(x / 0.05)
    return (1 - mix) * -logsigmoid(x) + mix * torch.exp(-x)


LOSSES: dict[str, Callable[[Known], Tensor]] = {
    "sigmoid": lambda k: -logsigmoid(BETA * k.h),  # arXiv:2305.18290, equation 7
    "hinge": lambda k: (1 - BETA * k.h).clamp(min=0),  # arXiv:2309.06657
    "ipo": _ipo,  # arXiv:2310.12036, equation 17, per token
    "exoPair": _exo,  # arXiv:2402.00856, equation 16
    "ncaPair": lambda k: (  # arXiv:2402.05369
        -logsigmoid(BETA * k.good) - 0.5 * logsigmoid(-BETA * k.good) - 0.5 * logsigmoid(-BETA * k.bad)
    ),
    "robust": lambda k: (  # arXiv:2403.00409
        (-(1 - EPSILON) * logsigmoid(BETA * k.h) + EPSILON * logsigmoid(-BETA * k.h)) / (1 - 2 * EPSILON)
    ),
    "bcoPair": lambda k: -logsigmoid(BETA * k.good) - logsigmoid(-BETA * k.bad),  # arXiv:2404.04656
    "sppoHard": lambda k: (k.good - 0.5 / BETA) ** 2 + (k.bad + 0.5 / BETA) ** 2,  # arXiv:2405.00675
    "aot": lambda k: _smoothed(  # arXiv:2406.05882
        (k.chosen - k.rejected).sort().values - (k.ref_chosen - k.ref_rejected).sort().values
    ),
    "aotUnpaired": lambda k: _smoothed(k.good.sort().values - k.bad.sort().values),
    "apoZero": lambda k: 1 - torch.sigmoid(BETA * k.good) + torch.sigmoid(BETA * k.bad),  # arXiv:2408.06266, 7
    "apoDown": lambda k: torch.sigmoid(BETA * k.good) + 1 - torch.sigmoid(BETA * k.h),  # the same, 8
    "discopop": _discopop,  # arXiv:2406.08414, equation 5
    "sft": lambda k: k.nll,
    "sigmoidNorm": lambda k: -logsigmoid(BETA * (k.good / k.chosen_length - k.bad / k.rejected_length)),
}


def test_every_loss_of_dpo(base: Path, tmp_path: Path, judge: Judge) -> None:
    assert set(LOSSES) == set(get_args(DpoLoss))
    trainer = _trainer(base, tmp_path, judge, "dpo", dpo={"beta": BETA})
    known = Known(trainer, AutoModelForCausalLM.from_pretrained(base))
    assert known.h.abs().max() > 0.1
    assert len(set(known.rejected_length.tolist())) > 1
    for name, formula in LOSSES.items():
        smoothing = EPSILON if name in ("exoPair", "robust", "aot", "aotUnpaired") else 0
        both = [name, "sft"] if name != "sft" else ["sft", "sigmoid"]
        knobs = {"beta": BETA, "lossType": both, "lossWeights": [0.5, 0.25], "labelSmoothing": smoothing}
        mixed = _trainer(base, tmp_path, judge, "dpo", dpo=knobs)
        other = LOSSES[both[1]](known).mean()
        wanted = 0.5 * formula(known).mean() + 0.25 * other
        assert _charged(mixed, known.batch) == pytest.approx(float(wanted), abs=1e-5), name


def test_the_knobs_of_dpo(base: Path, tmp_path: Path, judge: Judge) -> None:
    trainer = _trainer(base, tmp_path, judge, "dpo", dpo={"beta": BETA, "rpoAlpha": 0.7})
    known = Known(trainer, AutoModelForCausalLM.from_pretrained(base))
    plain = -logsigmoid(BETA * known.h).mean()
    assert _charged(trainer, known.batch) == pytest.approx(float(plain + 0.7 * known.nll), abs=1e-5)

    # arXiv:2409.06411, equation 10: beyond the shorter answer's length a token counts alpha.
    tempered = _trainer(base, tmp_path, judge, "dpo", dpo={"beta": BETA, "ldAlpha": 0.25})
    place = known.mask.cumsum(1)
    shorter = torch.minimum(known.chosen_length, known.rejected_length).repeat(2)[:, None]
    factor = torch.where(place <= shorter, 1.0, 0.25)
    good, bad = ((known.policy - known.reference) * factor).sum(1).chunk(2)
    wanted = -logsigmoid(BETA * (good - bad)).mean()
    assert _charged(tempered, known.batch) == pytest.approx(float(wanted), abs=1e-5)
    assert abs(float(wanted - plain)) > 1e-3


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_losses_without_a_reference(base: Path, tmp_path: Path, judge: Judge, tuner: str) -> None:
    def check(method: str, knobs: dict[str, Any], formula: Callable[[Known], Tensor]) -> None:
        trainer = _trainer(base, tmp_path, judge, method, tuner, **{method: knobs})
        assert isinstance(trainer, ReferenceFreeTrainer)
        assert trainer.ref_model is None
        assert not hasattr(trainer.model, "peft_config") or list(trainer.model.peft_config) == ["default"]
        assert not [name for name, _ in trainer.model.named_parameters() if ".ref." in name]
        known = Known(trainer, trainer.model)
        assert _charged(trainer, known.batch) == pytest.approx(float(formula(known)), abs=1e-5), (method, knobs)

    def mean(k: Known) -> tuple[Tensor, Tensor]:
        return k.chosen / k.chosen_length, k.rejected / k.rejected_length

    def odds(p: Tensor) -> Tensor:
        return p / (1 - p)

    # arXiv:2401.08417, equations 4 and 5.
    check(
        "cpo", {"beta": BETA, "alpha": 0.5}, lambda k: -logsigmoid(BETA * (k.chosen - k.rejected)).mean() + 0.5 * k.nll
    )
    check(
        "cpo",
        {"beta": BETA, "alpha": 0, "lossType": "hinge"},
        lambda k: (1 - BETA * (k.chosen - k.rejected)).clamp(min=0).mean(),
    )
    check(
        "cpo",
        {"beta": BETA, "alpha": 0, "lossType": "ipo"},
        lambda k: ((mean(k)[0] - mean(k)[1] - 1 / (2 * BETA)) ** 2).mean(),
    )
    # arXiv:2405.14734, equation 6.
    check("simpo", {}, lambda k: -logsigmoid(2 * mean(k)[0] - 2 * mean(k)[1] - 1).mean())
    check(
        "simpo",
        {"beta": 2.5, "gamma": 0.5, "cpoAlpha": 0.2},
        lambda k: -logsigmoid(2.5 * (mean(k)[0] - mean(k)[1]) - 0.5).mean() + 0.2 * k.nll,
    )
    # arXiv:2403.07691, equations 2 to 7.
    check(
        "orpo",
        {"lambda": 0.4},
        lambda k: (
            k.nll - 0.4 * torch.log(torch.sigmoid(torch.log(odds(mean(k)[0].exp()) / odds(mean(k)[1].exp())))).mean()
        ),
    )


def test_kto(base: Path, tmp_path: Path, judge: Judge) -> None:
    """arXiv:2402.01306, equations 7 and 8: the reference point is the mean log-ratio of mismatched answers, or zero."""
    knobs = {"beta": BETA, "desirableWeight": 1.2, "undesirableWeight": 0.9}
    trainer = _trainer(base, tmp_path, judge, "kto", kto=knobs)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    reference = AutoModelForCausalLM.from_pretrained(base)

    def ratio(prefix: str) -> Tensor:
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"][:, 1:]
        found = []
        for model in (trainer.model, reference):
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits
            found.append((logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1))
        return found[0] - found[1]

    point = ratio("KL_").mean().clamp(min=0)
    good = batch["label"]
    value = torch.where(
        good,
        1.2 * (1 - torch.sigmoid(BETA * (ratio("") - point))),
        0.9 * (1 - torch.sigmoid(BETA * (point - ratio("")))),
    )
    assert good.any()
    assert not good.all()
    assert _charged(trainer, batch) == pytest.approx(float(value.mean()), abs=1e-5)
    for row in range(5):
        # Each prompt stands before its neighbour's answer.
        own = batch["input_ids"][row - 1][batch["completion_mask"][row - 1].bool()].tolist()
        met = batch["KL_input_ids"][row][batch["KL_completion_mask"][row].bool()].tolist()
        prompt = int(batch["completion_mask"][row].argmax())
        assert met == own
        assert batch["KL_input_ids"][row][:prompt].tolist() == batch["input_ids"][row][:prompt].tolist()
