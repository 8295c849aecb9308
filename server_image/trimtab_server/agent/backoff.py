"""When to try again: soon and often at first, then slowly for as long as the wish stands."""

from __future__ import annotations

import random

FAST_TRIES = 5
"""Tries after which a failure that could have passed by itself counts as definite."""
FIRST_SECONDS = 1.0
SLOW_SECONDS = 60.0
"""Pause between later tries: mending the cause is enough, nobody has to tell the agent."""


def pause(tries: int, transient: bool) -> float:
    """Seconds until the next try after `tries` failures, with a tenth of jitter so that pods do not march in step."""
    fast = transient and tries < FAST_TRIES
    seconds = FIRST_SECONDS * 2.0 ** (tries - 1) if fast else SLOW_SECONDS
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311 - no secret


def definite(tries: int, transient: bool) -> bool:
    """Whether the failure shall no longer hold back the pod's first readiness."""
    return not transient or tries >= FAST_TRIES
