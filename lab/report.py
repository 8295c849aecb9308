"""What the lab says while it works, and how it says that something is wrong."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_started = time.monotonic()


class LabError(Exception):
    """Something that the person at the keyboard can put right; the message says how."""


def say(text: str) -> None:
    """Print one line of progress with the seconds since the start, on stderr: stdout is for results."""
    print(f"[{time.monotonic() - _started:5.0f} s] {text}", file=sys.stderr, flush=True)


@contextmanager
def step(text: str, estimate: float = 0) -> Iterator[None]:
    """Announce a piece of work, with its usual length in seconds if worth knowing, and say when it is done."""
    say(f"{text} (about {span(estimate)})" if estimate >= 3 else text)
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    if took >= 3:
        say(f"  done in {span(took)}")


def span(seconds: float) -> str:
    """Write a length of time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
