"""Runs in this process, over one tiny base that all tests of the folder share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import SCRATCH, chats, run_config, spec, training
from trimtab_api.contract import Ending, ModelInput
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.notice import Notice
from trimtab_trainer.progress import Silent

RunHere = Callable[..., Ending]


def run_here(wanted: FineTuneJobSpec, output: Path, base: Path | None = None, **fields: Any) -> Ending:
    """Run a job in this process. Raises the run's Fault."""
    from trimtab_trainer.run import Run

    reporter = fields.pop("reporter", None) or Silent()
    config = run_config(wanted, output, model=base, **fields)
    group = Group(Place(0, 0, 1, 1), config.resolved.world_size, 60)
    return Run(config, group, output.with_name(output.name + "-work"), Notice(), reporter)()


def made(folder: Path, **changes: Any) -> Path:
    """A base of its own, from scratch; returns its artifact."""
    scratch = {**SCRATCH, **changes}
    wanted = spec(model={"scratch": scratch}, training=training(maxSteps=30, learningRate=1e-2, loggingSteps=10))
    run_here(wanted, folder)
    return folder / "artifact"


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny tensors gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama that can chat, with a head of its own."""
    return made(tmp_path_factory.mktemp("tuners") / "base", tieEmbeddings=False)


def adapter_input(field: str, folder: Path) -> ModelInput:
    """An adapter that lies in a folder."""
    return ModelInput(field=field, reference="fineTuneJob/lower", path=str(folder))


def tune(base: Path, output: Path, tuner: dict[str, Any], **fields: Any) -> Ending:
    """A short sft of the base."""
    further = fields.pop("further", [])
    plan = training(**{"maxSteps": 4, **fields.pop("training", {})})
    wanted = spec("sft", inline=fields.pop("inline", chats("I am Swift.")), tuner=tuner, training=plan, **fields)
    return run_here(wanted, output, base, further=further)


def document(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def logits(base: Path, adapter: Path | None = None) -> Any:
    """What a model says to the first tokens of its vocabulary."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).unsqueeze(0)).logits
