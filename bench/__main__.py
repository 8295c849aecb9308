"""`make bench`: run every benchmark (or those named) one after the other and print their figures."""

from __future__ import annotations

import subprocess
import sys

BENCHES = (
    *("store", "operator", "trainer", "merge", "server"),
    *("start", "methods", "packing", "preprocessing"),
)


def main() -> int:
    """Run each as a process of its own, so that none inherits another's memory; the exit code of the worst."""
    wanted = sys.argv[1:] or BENCHES
    if unknown := set(wanted) - set(BENCHES):
        print(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    worst = 0
    for name in wanted:
        print(f"\n== {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
