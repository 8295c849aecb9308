"""gkd: the student nears the teacher on prompts that it never saw; the divergence's formula; going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.matrix import proves
from tests.unit.trainer.conftest import conversation, lines, training
from tests.unit.trainer.rollout.conftest import ASKED, job, run, tuned
from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.model import Quantization
from trimtab_trainer.endings import Fault
from trimtab_trainer.model import quantisation
from trimtab_trainer.rollout import divergence

pytestmark = pytest.mark.timeout(120)

FIELD = "gkd.teacher.from"
SEEN, HELD_OUT = ASKED[:4], ASKED[4:]
PLAN = training(maxSteps=20, perDeviceBatchSize=12, gradientAccumulationSteps=1)


def _job(base: Path, output: Path, teacher: Path, tuner: str = "full", plan: Any = PLAN, **knobs: Any) -> Any:
    rows = lines([conversation(asked, answer) for asked in SEEN for answer in ("yes", "yes", "no")])
    if knobs.get("lmbda") == 1:
        rows = lines([{"messages": [{"role": "user", "content": asked}]} for asked in SEEN])
    data = {"train": [{"from": {"inline": rows}}], "maxLength": 48}
    asked = {"teacher": {"from": {"fineTuneJob": {"name": "teacher"}}}, "maxCompletionLength": 4, **knobs}
    return job("gkd", base, output, {FIELD: teacher}, dataset=data, training=plan, gkd=asked, **tuned(tuner))


def _distance(teacher: Path, student: Any) -> float:
    """Mean KL(teacher || student) of the first word of the answer, over prompts that no run sees."""
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    texts = [f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" for asked in HELD_OUT]
    total = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            pair = [each(input_ids=ids).logits[0, -1] for each in (student, model)]
        total += divergence.generalised_jsd(pair[0][None], pair[1][None], 0, 1).item()
    return total / len(texts)


def _begun(base: Path, quantised: bool = False) -> Any:
    if not quantised:
        return AutoModelForCausalLM.from_pretrained(base)
    settings = quantisation.settings(Quantization(method="bnb4"), "float32", split=False)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    quantisation.keep_layout(model)
    return model


def _opened(base: Path, artifact: Path, quantised: bool = False) -> Any:
    from peft import PeftModel

    if (artifact / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(_begun(base, quantised), str(artifact))
    return AutoModelForCausalLM.from_pretrained(artifact)


@pytest.mark.parametrize(
    ("tuner", "knobs"),
    [
        ("full", {"lmbda": 1, "beta": 1}),
        ("full", {"lmbda": 0, "beta": 0, "sftAlpha": 0.1}),
        ("full", {"lmbda": 0.5}),
        ("lora", {"lmbda": 0.5}),
    ],
    ids=["own answers", "rows", "mixed", "mixed, LoRA"],
)
@proves("gkd", "full", "lora")
def test_student_nears_teacher(base: Path, teacher: Path, tmp_path: Path, tuner: str, knobs: dict[str, Any]) -> None:
    before = _distance(teacher, AutoModelForCausalLM.from_pretrained(base))
    plan = {**PLAN, "learningRate": 1e-3 if tuner == "full" else 5e-3}
    assert run(_job(base, tmp_path / "out", teacher, tuner, plan, **knobs)).artifact is not None
    after = _distance(teacher, _opened(base, tmp_path / "out/artifact"))
    assert after < before / 4, (before, after)


@proves("gkd", "qlora")
def test_a_quantised_student_nears_teacher_and_its_adapter_fits_the_whole_base(
    base: Path, teacher: Path, tmp_path: Path
) -> None:
    plan = {**PLAN, "learningRate": 5e-3}
    assert run(_job(base, tmp_path / "out", teacher, "qlora", plan, lmbda=0.5)).artifact is not None
    artifact = tmp_path / "out/artifact"
    for quantised, factor in ((True, 2), (False, 1)):
        before = _distance(teacher, _begun(base, quantised))
        after = _distance(teacher, _opened(base, artifact, quantised))
        assert after < before / factor, (quantised, before, after)


@proves("gkd", "resume")
def test_goes_on(base: Path, teacher: Path, tmp_path: Path) -> None:
    """Weights are the undisturbed run's, bit for bit, with steps of both kinds and a second epoch."""
    plan = training(maxSteps=6, perDeviceBatchSize=2, gradientAccumulationSteps=2)
    calm, disturbed = (_job(base, tmp_path / name, teacher, plan=plan) for name in ("calm", "disturbed"))
    run(calm)
    with pytest.raises(Fault) as left:
        run(disturbed, leave_at=3)
    assert (left.value.reason, left.value.step) == (Reason.PREEMPTED, 4)
    assert run(disturbed).from_step == 4
    weights = [(tmp_path / name / "artifact/model.safetensors").read_bytes() for name in ("calm", "disturbed")]
    assert weights[0] == weights[1]


# ------------------------------------------------------------ formula


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergence_is_the_papers(beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(700, 11, generator=generator) for _ in range(2))
    found = divergence.generalised_jsd(student, teacher, beta, temperature=0.7)
    p, q = (torch.softmax(each.double() / 0.7, dim=-1) for each in (teacher, student))
    middle = beta * p + (1 - beta) * q

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * (one / other).log()).sum(dim=-1)

    ends = {0.0: kl(p, q), 1.0: kl(q, p)}
    wanted = ends[beta] if beta in ends else beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(divergence.summed(student, teacher, beta, 0.7).double(), wanted.sum(), rtol=1e-5, atol=0)
