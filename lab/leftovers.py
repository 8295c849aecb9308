"""Whatever a cluster left behind, however it ended: found by what it is, not by what was written down, and removed."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

from lab import builder, network, paths, process
from lab.run import run

STRAYS = (
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/log/pods",
    "/var/log/containers",
    "/run/containerd",
    "/opt/containerd",
    "/etc/cni",
    "/opt/cni",
    "/usr/libexec/kubernetes",
    "/var/lib/containers",
)
"""Folders that kubelet, containerd and buildah make outside the state folder, whatever they are told."""

KEPT = ("containerd", "s3", "s3.json", "logs", "outside.json")
"""What survives a crash: images and users' data. The API's objects and the node's pods do not."""


def processes(state: Path) -> list[int]:
    """Return everything that a cluster with this state folder runs: its programs, its shims, and what pods run."""
    own = Path("/proc/self/ns/mnt").stat().st_ino
    return [pid for pid in process.everyone() if pid != os.getpid() and _belongs(pid, state, own)]


def clear(state: Path, settings: dict[str, str]) -> None:
    """End every process of the cluster, and take away its mounts, its network and its cgroups. Files stay."""
    for attempt in range(5):
        # Shims restart nothing, but a process may fork while it is being killed: look again until none is left.
        if not (left := processes(state)):
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.end(left, grace=0 if attempt < 4 else 1)
    unmount(state)
    network.down(settings)
    remove_cgroups()


def unmount(*folders: Path) -> None:
    """Unmount everything below these folders, deepest first, whether it is in use or not."""
    for point in sorted(mounts(*folders), key=len, reverse=True):
        run(["umount", "--lazy", point], check=False)


def mounts(*folders: Path) -> list[str]:
    """Return the mount points at or below these folders."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if any(point == str(folder) or point.startswith(f"{folder}/") for folder in folders):
            found.append(point)
    return found


def forget_objects(state: Path) -> None:
    """Remove what does not survive a crash from the state folder."""
    for entry in state.iterdir() if state.exists() else []:
        if entry.name not in KEPT:
            remove(entry)


def remove_files(state: Path, strays: list[str]) -> None:
    """Remove the state folder, the builder's run-time folder, and the named folders that were not there before."""
    unmount(builder.RUNTIME, builder.store_folder(), *map(Path, strays))
    for folder in (state, builder.RUNTIME, *map(Path, strays)):
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_cgroups() -> None:
    """Remove the cgroups of pods, which are empty by now."""
    for root in [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]:
        pods = root / "kubepods"
        if not pods.is_dir():
            continue
        folders = sorted((entry for entry in pods.rglob("*") if entry.is_dir()), key=lambda each: -len(each.parts))
        for folder in [*folders, pods]:
            with contextlib.suppress(OSError):  # A folder with a process of another cluster is not ours to remove.
                folder.rmdir()


def traces(state: Path) -> list[str]:
    """Return what is still there of a cluster, in words; nothing after `down`."""
    found = [f"process {pid}: {process.command(pid)[:100]}" for pid in processes(state)]
    found += [f"mount {point}" for point in mounts(state, builder.RUNTIME)]
    if Path("/sys/class/net", network.BRIDGE).exists():
        found.append(f"bridge {network.BRIDGE}")
    found += [f"{family} rules" for family in network.FAMILIES if network.swept(network.rules(family)) is not None]
    found += [f"folder {folder}" for folder in (state, builder.RUNTIME) if folder.exists()]
    return found


def _belongs(pid: int, state: Path, own_mounts: int) -> bool:
    said = process.command(pid)
    if said.startswith(f"{state}/bin/") or f"{state}/run/containerd.sock" in said:
        return True
    try:
        if Path(f"/proc/{pid}/ns/mnt").stat().st_ino == own_mounts:
            return False
        # A container sees its own root as a mount whose upper folder lies in our containerd's.
        return f"upperdir={state}/containerd/" in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False  # It ended while we looked.


def caches() -> dict[str, int]:
    """Return the bytes that each part of the cache takes."""
    return {entry.name: size(entry) for entry in sorted(paths.cache().iterdir()) if entry.is_dir()}


def size(folder: Path) -> int:
    """Return the bytes that a folder takes on disk."""
    said = run(["du", "-s", "-x", "-B1", folder], check=False, timeout=300).stdout.split()
    return int(said[0]) if said else 0
