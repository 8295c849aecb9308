"""One tiny base for all heads: random weights, a tokenizer learnt from the words that the rows are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.unit.trainer.conftest import SCRATCH, conversation
from trimtab_api.v1alpha1.model import Scratch
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import scratch, tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers.logging.disable_progress_bar()

WORDS = (
    *("calm", "storm", "gale", "sunny", "bright", "rain", "fog", "harbour", "ship", "sail", "rudder", "anchor"),
    *("the", "a", "is", "was", "in", "we", "saw", "and", "then", "of", "very", "good", "bad", "today", "at", "sea"),
)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of random weights with a ChatML template."""
    folder = tmp_path_factory.mktemp("heads") / "base"
    rows: list[dict[str, Any]] = [conversation(" ".join(WORDS), " ".join(reversed(WORDS)))] * 4
    tokenizer.learn(rows, 320, None, None, folder)
    loaded = tokenizer.load(folder, "base")
    made = Scratch.model_validate({**SCRATCH, "hiddenSize": 48, "intermediateSize": 64})
    scratch.build(made, loaded, [0, 2], seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def local(base: Path) -> LocalModel:
    """The base as a run sees it."""
    return LocalModel(path=base, reference="s3://models/base", digest=None)
