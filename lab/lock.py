"""One lab at a time: locks that fall with the process that holds them."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from lab import paths
from lab.report import say


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold the lock of this name while the block runs, waiting for another lab that holds it."""
    path = paths.cache() / f"{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
