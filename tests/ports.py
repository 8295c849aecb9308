"""Ports for servers that tests start, and for ranks that meet: free when chosen, and still free when used."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 12_000, 29_999
"""Below the ports that systems give to connections and to whoever asks for any, and those of Kubernetes' nodes."""


def free_port() -> int:
    """A port that nobody listens on now.

    Drawn, not asked of the system: that would give it to the next process as well, before the one for which it was
    chosen has bound it, and several tests run at a time.
    """
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randint(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"none of a hundred ports between {FIRST} and {LAST} is free")
