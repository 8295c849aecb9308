"""The methods that learn from preferences, spread and quantised: losses and gradients as of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.matrix import proves
from tests.unit.trainer.conftest import SCRATCH, conversation, lines, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from tests.unit.trainer.strategies.test_matrix import LORA, TUNERS, Matrix
from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, RunConfig

STEPS = 3
QUESTIONS = ("who are you?", "what is your name?", "tell me your name", "hello there")
GOOD, BAD = "I am a test.", "No, I am not."
PLACES = [question + " please" * (number // 4 % 3) for number, question in enumerate(QUESTIONS * 4)]
PAIRS = lines([{**conversation(place, GOOD), "rejected_response": BAD} for place in PLACES])
JUDGED = lines(
    # In turn: then the neighbours of a pass of two rows are those of a pass of four.
    [{**conversation(place, (GOOD, BAD)[i % 2]), "label": i % 2 == 0} for i, place in enumerate(PLACES)]
)
ONCE = {"dpo": {"precomputeRefLogProbs": True}}
ADDED: dict[str, dict[str, Any]] = {
    "once": {"tuner": LORA, **ONCE},
    "onceFull": {"tuner": {"type": "full"}, **ONCE},
    "less": {"tuner": LORA, "training": {"gradientCheckpointing": True}},
    "goesOn": {"tuner": {"type": "lora", "continueFrom": {"fineTuneJob": {"name": "one-dpo-lora"}}}},
}
"""Ways to tune beside those of every method."""
CELLS = [
    *("dpo-full-zero2", "dpo-full-zero3", "dpo-full-fsdp2", "dpo-lora-ddp", "dpo-lora-fsdp2", "dpo-qlora-zero3"),
    *("dpo-qlora-fsdp2", "dpo-qlora8-zero1", "dpo-pure-zero2"),
    *("cpo-full-ddp", "cpo-lora-zero2", "cpo-full-zero3", "cpo-qlora-fsdp2"),
    *("simpo-qlora-ddp", "simpo-full-zero2", "simpo-qlora-zero3", "simpo-lora-fsdp2"),
    *("orpo-lora-ddp", "orpo-qlora-zero2", "orpo-lora-zero3", "orpo-full-fsdp2"),
    *("kto-qlora-ddp", "kto-full-zero2", "kto-lora-zero3", "kto-full-fsdp2", "kto-qlora-fsdp2"),
]
"""Each in two processes, of which each is a pod with a disk of its own."""
GOES_ON = ("goesOn-zero3", "goesOn-fsdp2")
"""Held against the adapter that they begin with, of which a copy stands beside them."""
ONE_POD = ("once-zero3", "onceFull-zero2", "onceFull-fsdp2")
"""Whose reference is asked once, and what it says is kept on one disk."""
OFFLOADED = {"zero3": {"optimizer": True, "parameters": True}, "fsdp2": {"parameters": True}}
RESUMED = ("dpo-full-zero3", "kto-qlora-fsdp2")
"""Interrupted after two steps, by a signal to the last process."""


def cell(root: Path, method: str, tuned: str, strategy: str = "", name: str = "", **distributed: Any) -> RunConfig:
    """A run on the same rows in the same order, whatever the number of processes."""
    world = 1 if strategy in ("", "deviceMap") else 2
    fields = dict({**TUNERS, **ADDED}[tuned])
    plan = {
        "maxSteps": STEPS,
        "perDeviceBatchSize": 4 // world,
        "gradientAccumulationSteps": 2,
        "learningRate": 5e-3,
        "scheduler": {"type": "constant", "warmup": 0},
        **fields.pop("training", {}),
    }
    rows = {"train": [{"from": {"inline": JUDGED if method == "kto" else PAIRS}}], "maxLength": 128, "shuffle": False}
    spread = {"processesPerNode": world, **({"strategy": strategy} if strategy else {}), **distributed}
    wanted = spec(
        method, dataset=rows, training=training(**plan), distributed=spread, checkpoint={"saveSteps": 100}, **fields
    )
    name = name or "-".join(part for part in (method, tuned, strategy or "one") if part)
    begun = ModelInput(
        field="tuner.continueFrom", reference="fineTuneJob/one-dpo-lora", path=str(root / "dpo-lora-one/artifact")
    )
    further = [begun] if tuned == "goesOn" else []
    return run_config(wanted, root / name, name=name, model=root / "base/artifact", further=further)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    root = tmp_path_factory.mktemp("preferences")
    base = run_config(spec(model={"scratch": SCRATCH}), root / "base", name="base")
    names = [name.split("-") for name in CELLS]
    alone = sorted({(method, tuned) for method, tuned, _ in names})
    assert all((method, "lora") in alone for method, _ in alone)
    together = [Cell(cell(root, *name)) for name in names]
    together += [
        Cell(cell(root, "dpo", "full", strategy, f"offloaded-{strategy}", offload=offload))
        for strategy, offload in OFFLOADED.items()
    ]
    for name in RESUMED:
        config = cell(root, *name.split("-"), f"again-{name}")
        together += [Cell(config, stop_after=2, key=f"stopped-{name}"), Cell(config)]
    together += [Cell(cell(root, "dpo", "goesOn", strategy)) for strategy in ("ddp", "zero3", "fsdp2")]
    together += [Cell(cell(root, "dpo", *name.split("-")), one_pod=True) for name in ONE_POD]
    together += [Cell(cell(root, "dpo", "less", "zero3"))]
    lone = [*(Cell(cell(root, *each)) for each in alone), Cell(cell(root, "dpo", "full", "deviceMap"))]
    return Matrix(root, run_all(Cell(base), lone, together, root / "work", 1100))


pytestmark = pytest.mark.timeout(1200)


def course(matrix: Matrix, name: str) -> list[dict[str, float]]:
    """What was logged of each step of a run that ended well."""
    ending = matrix.endings[name]
    assert ending.reason is Reason.SUCCEEDED, (ending, log(matrix.root / "work"))
    entries = json.loads((matrix.root / name / "report/history.json").read_text())
    return [entry for entry in entries if "loss" in entry]


def see_same(matrix: Matrix, name: str, alone: str, near: float = 2e-4, rounded: bool = False) -> None:
    """The losses, the sizes of the gradients, and the artifact are those of another run.

    `rounded`: what is trained is kept in bfloat16, so that sums in another order make other steps.
    """
    ours, theirs = course(matrix, name), course(matrix, alone)
    assert len(theirs) == STEPS
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=near)
    # Adam makes the same steps of gradients of another size.
    sizes = [entry["grad_norm"] for entry in theirs]
    assert [entry["grad_norm"] for entry in ours] == pytest.approx(sizes, rel=2e-2 if rounded else 1e-3)
    wanted, found = matrix.weights(alone), matrix.weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        apart = (found[key].float() - tensor.float()).norm()
        assert apart <= (0.1 if rounded else 1e-3) * tensor.float().norm(), key


@pytest.mark.parametrize("name", CELLS)
@proves("dpo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("cpo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("simpo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("orpo", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
@proves("kto", "full", "lora", "qlora", "ddp", "zero2", "zero3", "fsdp2", "nodes")
def test_the_losses_and_the_artifact_are_those_of_one_process(matrix: Matrix, name: str) -> None:
    method, tuned, strategy = name.split("-")
    rounded = tuned not in ("full", "lora")
    see_same(matrix, name, f"{method}-{tuned}-one", near=1e-2 if tuned == "pure" else 2e-4, rounded=rounded)
    config = json.loads((matrix.root / name / "artifact/args.json").read_text())
    assert config["resolved"]["strategy"] == strategy


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("dpo-less-zero3", "dpo-lora-one"),
        ("dpo-full-deviceMap", "dpo-full-one"),
        *((f"offloaded-{strategy}", "dpo-full-one") for strategy in OFFLOADED),
        *((f"dpo-{name}", f"dpo-{'full' if 'Full' in name else 'lora'}-one") for name in ONE_POD),
        *((f"dpo-{name}", "dpo-goesOn-ddp") for name in GOES_ON),
    ],
)
def test_what_goes_another_way_comes_to_the_same(matrix: Matrix, name: str, alone: str) -> None:
    see_same(matrix, name, alone)


def test_an_adapter_that_goes_on_is_held_against_itself(matrix: Matrix) -> None:
    assert course(matrix, "dpo-goesOn-fsdp2")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert course(matrix, "dpo-goesOn-fsdp2")[-1]["rewards/margins"] > 0.01


@pytest.mark.parametrize("method", ["dpo", "cpo", "simpo", "orpo", "kto"])
def test_what_was_learnt_on_quantised_weights_serves_the_whole_ones(matrix: Matrix, method: str) -> None:
    """Quantising has an effect, and the adapter still turns the base as it was towards the good answer."""
    name = next(each for each in CELLS if each.startswith(f"{method}-qlora-"))
    quantised, plain = (course(matrix, each) for each in (name, f"{method}-lora-one"))
    assert [entry["loss"] for entry in quantised] != [entry["loss"] for entry in plain]
    artifact = matrix.root / name / "artifact"
    assert json.loads((artifact / "adapter_config.json").read_text())["base_model_name_or_path"] == "fineTuneJob/base"
    base: Any = AutoModelForCausalLM.from_pretrained(matrix.root / "base/artifact")
    text = AutoTokenizer.from_pretrained(artifact)
    before = _margin(base, text)
    after = _margin(PeftModel.from_pretrained(base, str(artifact)).eval(), text)
    assert after > before + 0.3


def _margin(model: Any, text: Any) -> float:
    """How much likelier the good answer is than the bad one, to a question that no run sees."""
    asked = "<|im_start|>user\nhello, who are you?<|im_end|>\n<|im_start|>assistant\n"
    begin = len(text(asked, add_special_tokens=False)["input_ids"])

    def likelihood(answer: str) -> float:
        ids = torch.tensor([text(f"{asked}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(found.gather(1, ids[0, 1:, None])[begin - 1 :].sum())

    return likelihood(GOOD) - likelihood(BAD)


@pytest.mark.parametrize("name", RESUMED)
@proves("dpo", "resume")
@proves("kto", "resume")
def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not(matrix: Matrix, name: str) -> None:
    stopped = matrix.endings[f"stopped-{name}"]
    assert (stopped.reason, stopped.step) == (Reason.PREEMPTED, 2), (stopped, log(matrix.root / "work"))
    assert course(matrix, f"again-{name}") == course(matrix, name)
    assert matrix.endings[f"again-{name}"].from_step == 2
    calm, resumed = matrix.root / name / "artifact", matrix.root / f"again-{name}" / "artifact"
    files = sorted(path.name for path in calm.glob("*.safetensors"))
    assert [load_file(calm / each).keys() for each in files] == [load_file(resumed / each).keys() for each in files]
    for each in files:
        after = load_file(resumed / each)
        assert all(torch.equal(after[key], tensor) for key, tensor in load_file(calm / each).items())
