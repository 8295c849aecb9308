"""The engine container's preStop hook: lets the pod's streams end before the engine is told to.

The kubelet ends a native sidecar only after the main containers. Without this hook the engine would get its SIGTERM
while the agent still passes requests to it.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

DRAIN_PORT = 8002
"""Where the agent takes the word, on 127.0.0.1 alone."""
DRAIN_SECONDS = 90.0
"""Longest wait for running answers."""


def main() -> int:
    """Ask the agent to drain and wait until it has; a missing agent is no reason to keep the engine."""
    request = urllib.request.Request(f"http://127.0.0.1:{DRAIN_PORT}/drain", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=DRAIN_SECONDS + 10) as answer:  # noqa: S310 - our own loopback
            answer.read()
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"drain: the agent does not answer on 127.0.0.1:{DRAIN_PORT}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
