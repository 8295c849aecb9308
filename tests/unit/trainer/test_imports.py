"""What a rank does without: never a library that its spec needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.trainer.conftest import run_config, spec, training
from trimtab_api.contract import CodeInput
from trimtab_trainer.imports import unused

ALL = {"sklearn", "scipy", "deepspeed", "bitsandbytes", "mlflow", "wandb"}


def base(tmp_path: Path, **described: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **described}))
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, set()),
        ({"training": training(optimizer="adamw8bit")}, {"bitsandbytes"}),
        ({"training": training(optimizer="lion")}, {"bitsandbytes"}),
        (
            {"model": {"from": {"fineTuneJob": {"name": "base"}}, "quantization": {"method": "bnb4"}}},
            {"bitsandbytes"},
        ),
        ({"distributed": {"strategy": "zero2", "processesPerNode": 2}}, {"deepspeed"}),
        ({"method": "embedding"}, {"sklearn", "scipy"}),
        ({"method": "reranker"}, {"sklearn", "scipy"}),
    ],
)
def test_what_a_spec_needs_is_kept(tmp_path: Path, fields: dict[str, Any], kept: set[str]) -> None:
    config = run_config(spec(**{"method": "sft", **fields}), tmp_path, model=base(tmp_path))
    assert set(unused(config)) == ALL - kept


@pytest.mark.parametrize(
    "described",
    [
        pytest.param({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, id="quantised"),
        pytest.param(None, id="not here yet"),
    ],
)
def test_a_base_that_may_be_quantised_keeps_bitsandbytes(tmp_path: Path, described: dict[str, Any] | None) -> None:
    model = tmp_path if described is None else base(tmp_path, **described)
    assert "bitsandbytes" not in unused(run_config(spec("sft"), tmp_path, model=model))


def test_code_of_the_user_s_finds_everything(tmp_path: Path) -> None:
    code = CodeInput(field="grpo.rewards[0].python", reference="configMap://a/b.py", path="b.py")
    assert unused(run_config(spec("sft"), tmp_path, model=base(tmp_path), code=[code])) == []


def test_what_is_left_out_passes_for_not_installed_and_what_is_loaded_stays() -> None:
    program = f"""
import importlib.util, sys
sys.path[:] = {sys.path!r}
import json
from trimtab_trainer.imports import leave_out
leave_out(["json", "scipy"])
print(importlib.util.find_spec("scipy"), json is sys.modules["json"])
try:
    import scipy
except ModuleNotFoundError:
    print("not there")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["None True", "not there"]


def test_what_reads_films_is_left_alone_where_none_is_shown() -> None:
    """Every room of rows is loaded by the preflight."""
    check = "import sys, trimtab_trainer.preflight, trimtab_trainer.data.opened; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
