"""What is looked at before anything starts: rights, memory, disk."""

import os
import shutil
from pathlib import Path

from lab import paths
from lab.report import LabError

GIB = 1 << 30
MEMORY = 6 * GIB
"""What the cluster (1.5 GiB) and one engine or trainer need."""
DISK_COLD = 34 * GIB
"""Builder, registry and node with all images at their largest, and the caches of a first build."""
DISK_WARM = 6 * GIB


def check(images_built: bool) -> None:
    """See that the computer can carry the cluster.

    Args:
        images_built: Whether the images are in the builder's store already, so that little more is written.

    Raises:
        LabError: Something is missing; the message says how much and where.
    """
    wrong = []
    if os.geteuid():
        wrong.append("a node needs root (namespaces, mounts, iptables): run this as root")
    memory = _memory()
    if memory < MEMORY:
        wrong.append(
            f"{memory / GIB:.1f} GiB of memory are available, {MEMORY / GIB:.0f} are needed: end other programs"
        )
    wanted = DISK_WARM if images_built else DISK_COLD
    folders = {existing(paths.cache()), existing(paths.state())}
    devices = {folder.stat().st_dev: folder for folder in folders}
    for folder in devices.values():
        free = shutil.disk_usage(folder).free
        if free < wanted:
            wrong.append(
                f"{free / GIB:.1f} GiB are free at {folder}, {wanted / GIB:.0f} are needed: "
                "make room, or set TRIMTAB_CACHE and TRIMTAB_STATE to folders on a larger disk"
            )
    if wrong:
        raise LabError("\n".join(wrong))


def existing(path: Path) -> Path:
    """Return the path or its nearest ancestor that exists."""
    while not path.exists():
        path = path.parent
    return path


def _memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return MEMORY
