"""Debian packages that the lab needs on this computer."""

import shutil

from lab.report import LabError, step
from lab.run import run

NODE = {
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "mount": "mount",
    "openssl": "openssl",
    "setpriv": "util-linux",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "busybox": "busybox-static",
}
"""Package by the program that is looked for."""


def install() -> None:
    """Install what is missing.

    Raises:
        LabError: apt is missing or failed; the message names the packages.
    """
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    missing = sorted({package for program, package in NODE.items() if not shutil.which(program, path=path)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise LabError(f"install these first (there is no apt-get here): {' '.join(missing)}")
    with step(f"installing Debian packages: {' '.join(missing)}", 30):
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        wait = ["-o", "DPkg::Lock::Timeout=120"]
        run(["apt-get", "update", "-q", *wait], timeout=300, env=env)
        run(["apt-get", "install", "-q", "-y", "--no-install-recommends", *wait, *missing], timeout=900, env=env)
