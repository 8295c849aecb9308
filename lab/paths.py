"""Where the lab keeps things: a cache that survives `down`, and state that does not."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

TOOLS = ROOT / "lab" / "tools"
"""One pinned Go module for each group of programs."""


def cache() -> Path:
    """Return the folder of everything that is built or fetched once, keyed by content."""
    return Path(os.environ.get("TRIMTAB_CACHE") or Path.home() / ".cache" / "trimtab")


def state() -> Path:
    """Return the folder of the running cluster; `down` removes it whole."""
    return Path(os.environ.get("TRIMTAB_STATE") or "/var/lib/trimtab-lab")
