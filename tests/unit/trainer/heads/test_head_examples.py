"""The examples of the methods with heads run as they are, given a base."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.trainer.conftest import run_config
from tests.unit.trainer.heads.conftest import Quiet
from trimtab_api.conditions import Reason
from trimtab_trainer import yamlfile
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.notice import Notice
from trimtab_trainer.run import Run

EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "methods"


@pytest.mark.parametrize("name", ["reward-model", "sequence-classification", "embedding", "reranker"])
def test_an_example_runs(base: Path, tmp_path: Path, name: str) -> None:
    _, wanted = yamlfile.read(EXAMPLES / f"{name}.yaml")
    config = run_config(wanted, tmp_path / "out", model=base)
    ending = Run(config, Group(Place.here(), 1, 60), tmp_path / "work", Notice(), Quiet())()
    assert ending.reason is Reason.SUCCEEDED
    assert ending.artifact is not None
    assert ending.artifact.kind == "adapter"
