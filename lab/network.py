"""The node's network: one bridge that carries its address, forwarding, and the rules that kube-proxy leaves behind."""

import shutil
from pathlib import Path

from lab.report import LabError
from lab.run import SYSTEM_PATH, run

BRIDGE = "trimtab0"
ADDRESS = "10.88.0.1"
SUBNET = "10.88.0.0/24"
FAMILIES = ("iptables", "ip6tables")
_MARK = "trimtab-lab"
_OURS = (_MARK, "KUBE-", "CNI-")
_RULES = (
    ("nat", "POSTROUTING", ["-s", SUBNET, "!", "-d", SUBNET, "-j", "MASQUERADE"]),
    ("filter", "FORWARD", ["-i", BRIDGE, "-j", "ACCEPT"]),
    ("filter", "FORWARD", ["-o", BRIDGE, "-j", "ACCEPT"]),
)
_SETTINGS = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1"}


def settings() -> dict[str, str]:
    """Return the kernel's settings that `up` will change, with their present values, for `down`."""
    present = {name: (Path("/proc/sys") / name) for name in _SETTINGS}
    return {
        name: file.read_text().strip()
        for name, file in present.items()
        if file.exists() and file.read_text().strip() != _SETTINGS[name]
    }


def up() -> None:
    """Make the bridge, its rules and the kernel's settings, unless they are there.

    Raises:
        LabError: Another interface has the lab's address.
    """
    _unclaimed()
    if not _exists():
        run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        run(["ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    for name in settings():
        (Path("/proc/sys") / name).write_text(_SETTINGS[name])
    for table, chain, rule in _RULES:
        marked = [*rule, "-m", "comment", "--comment", _MARK]
        if run(["iptables", "-w", "-t", table, "-C", chain, *marked], check=False).returncode:
            run(["iptables", "-w", "-t", table, "-I", chain, *marked])


def down(before: dict[str, str]) -> None:
    """Remove the bridge with all that hangs on it and every rule of the cluster, and put the settings back."""
    if _exists():
        for link in sorted(Path("/sys/class/net", BRIDGE, "brif").iterdir()):
            run(["ip", "link", "delete", link.name], check=False)
        run(["ip", "link", "delete", BRIDGE])
    for family in FAMILIES:
        if (kept := swept(rules(family))) is not None:
            run([f"{family}-restore", "-w"], stdin=kept)
    for name, value in before.items():
        (Path("/proc/sys") / name).write_text(value)


def rules(family: str) -> str:
    """Return all rules of iptables or ip6tables; nothing where the program is not installed."""
    program = shutil.which(f"{family}-save", path=SYSTEM_PATH)
    return run([program], check=False).stdout if program else ""


def swept(dump: str) -> str | None:
    """Return a dump of rules without those of the cluster, or None when there are none in it."""
    lines = dump.splitlines()
    kept = [line for line in lines if not any(mark in line for mark in _OURS)]
    return None if len(kept) == len(lines) else "\n".join(kept) + "\n"


def _exists() -> bool:
    return Path("/sys/class/net", BRIDGE).exists()


def _unclaimed() -> None:
    for line in run(["ip", "-o", "-4", "address"]).stdout.splitlines():
        _, name, _, address = line.split()[:4]
        if name != BRIDGE and address.startswith("10.88.0."):
            raise LabError(
                f"interface {name} already has {address}, which the lab needs; remove it (podman makes such)"
            )
