"""Memory that is taken again, and never while somebody looks at it; libraries that are left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.merge.conftest import Models
from trimtab_trainer.imports import UNUSED_BY_MERGES
from trimtab_trainer.merge import memory

SIZE = 3 << 20


def where(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free", {})


def test_a_block_is_taken_again_when_nobody_has_it() -> None:
    first = memory.take(SIZE)
    second = memory.take(SIZE)
    places = {where(first), where(second)}
    assert len(places) == 2
    del first, second
    again = [memory.take(SIZE - 1), memory.take(SIZE + 1)]
    assert {where(view) for view in again} == places
    assert [len(view) for view in again] == [SIZE - 1, SIZE + 1]


@pytest.mark.parametrize(
    "kept",
    [
        lambda view: view[5:9],
        lambda view: torch.frombuffer(view, dtype=torch.uint8),
        lambda view: torch.frombuffer(view, dtype=torch.float32)[3:].reshape(-1),
        lambda view: memoryview(torch.frombuffer(view, dtype=torch.uint8).numpy())[1:],
    ],
    ids=["slice", "tensor", "view of a tensor", "bytes of a tensor"],
)
def test_a_block_is_not_taken_while_something_of_it_is_kept(kept: object) -> None:
    assert callable(kept)
    view = memory.take(SIZE)
    place = where(view)
    held = kept(view)
    del view
    assert where(memory.take(SIZE)) != place
    del held
    assert place in {where(memory.take(SIZE)), where(memory.take(SIZE))}


def test_every_size() -> None:
    for size in (0, 1, 1 << 16, (1 << 16) + 1, (1 << 24) + 1):
        assert len(memory.take(size)) == size
    assert memory.empty((2, 3), torch.bfloat16).shape == (2, 3)
    assert memory.empty((0, 3), torch.float32).numel() == 0
    assert memory.empty((), torch.float32).shape == ()


def test_a_merge_needs_none_of_what_it_leaves_out(models: Models, tmp_path: Path) -> None:
    base = models.base()
    arguments = ["--base", str(base), "--adapter", str(models.adapter(base)), "--output", str(tmp_path / "merged")]
    program = f"""
import sys
from trimtab_trainer.merge.__main__ import main
code = main({arguments!r})
print({{name: sys.modules.get(name, "not asked for") for name in {UNUSED_BY_MERGES!r}}})
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(dict.fromkeys(UNUSED_BY_MERGES))
