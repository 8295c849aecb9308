"""The programs of the cluster, built from pinned Go modules and cached by what they are built from."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import golang, paths
from lab.lock import alone
from lab.report import LabError, say, span, step
from lab.run import run

KUBERNETES = "v1.36.3"
TRAINING_OPERATOR = "v1.9.3"

_CONTAINERD_TAGS = "no_btrfs,no_zfs,no_devmapper"
_KUBERNETES_FLAGS = " ".join(
    f"-X {package}.{name}={value}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for name, value in (
        ("gitVersion", KUBERNETES),
        ("gitMajor", "1"),
        ("gitMinor", KUBERNETES.split(".")[1]),
        ("gitTreeState", "clean"),
    )
)


@dataclass(frozen=True)
class Tool:
    """One program: the folder of its go.mod, its package, and the seconds that a cold build took on two cores."""

    name: str
    group: str
    package: str
    seconds: int
    ldflags: str = ""
    tags: str = ""

    def key(self, go_version: str) -> str:
        """Return what the binary depends on, as a short digest."""
        said = hashlib.sha256("\0".join((self.package, self.ldflags, self.tags, go_version)).encode())
        for file in sorted((paths.TOOLS / self.group).iterdir()):
            said.update(file.name.encode() + b"\0" + file.read_bytes())
        return said.hexdigest()[:16]


CNI = ("bridge", "loopback", "host-local", "portmap")
"""Network plug-ins: kept off PATH, where `bridge` is another program's name."""


def _kubernetes(name: str, seconds: int) -> Tool:
    return Tool(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", seconds, _KUBERNETES_FLAGS)


def _containerd(name: str, seconds: int) -> Tool:
    return Tool(name, "containerd", f"github.com/containerd/containerd/v2/cmd/{name}", seconds, tags=_CONTAINERD_TAGS)


def _cni(kind: str, name: str, seconds: int) -> Tool:
    return Tool(name, "cni", f"github.com/containernetworking/plugins/plugins/{kind}/{name}", seconds)


ALL = {
    tool.name: tool
    for tool in (
        Tool("etcd", "etcd", "go.etcd.io/etcd/server/v3", 25),
        _kubernetes("kube-apiserver", 181),
        _kubernetes("kubectl", 16),
        _kubernetes("kube-controller-manager", 42),
        _kubernetes("kube-scheduler", 4),
        _kubernetes("kubelet", 12),
        _kubernetes("kube-proxy", 5),
        _containerd("containerd", 45),
        _containerd("containerd-shim-runc-v2", 3),
        _containerd("ctr", 3),
        _cni("main", "bridge", 3),
        _cni("main", "loopback", 1),
        _cni("ipam", "host-local", 1),
        _cni("meta", "portmap", 1),
        Tool("pause", "pause", ".", 1),
        Tool("registry", "registry", "github.com/distribution/distribution/v3/cmd/registry", 48),
        Tool("coredns", "coredns", "github.com/coredns/coredns", 83),
        Tool("helm", "helm", "helm.sh/helm/v3/cmd/helm", 56),
        Tool("training-operator", "training-operator",
             "github.com/kubeflow/training-operator/cmd/training-operator.v1", 58),
    )
}  # fmt: skip


def ensure(names: Sequence[str] = tuple(ALL)) -> dict[str, Path]:
    """Return the path of each named program, building those that the cache lacks.

    Raises:
        LabError: A build failed; the message names its log.
    """
    go = golang.find()
    version = ".".join(map(str, golang.version_of(go)))
    wanted = {name: _place(ALL[name], version) for name in names}
    if all(path.exists() for path in wanted.values()):
        return wanted
    with alone("tools"):
        missing = [ALL[name] for name, path in wanted.items() if not path.exists()]
        left = sum(tool.seconds for tool in missing)
        say(f"{len(missing)} programs to build, about {span(left)} in all on two cores; cached afterwards")
        for number, tool in enumerate(missing, start=1):
            with step(f"building {tool.name} ({number} of {len(missing)}, {span(left)} left in all)", tool.seconds):
                _build(go, tool, wanted[tool.name])
            left -= tool.seconds
    return wanted


def link(names: Sequence[str], folder: Path) -> Path:
    """Make a folder for PATH that holds the named programs, as links into the cache, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in ensure(names).items():
        here = folder / name
        if not (here.is_symlink() and here.readlink() == path):
            here.unlink(missing_ok=True)
            here.symlink_to(path)
    return folder


def manifests() -> Path:
    """Return training-operator's own manifests (CRDs, RBAC, webhook), as its module ships them."""
    digest = hashlib.sha256((paths.TOOLS / "training-operator" / "go.sum").read_bytes()).hexdigest()[:16]
    place = paths.cache() / "bin" / "training-operator-manifests" / digest
    if not place.exists():
        with alone("tools"), step("fetching training-operator's manifests"):
            module = "github.com/kubeflow/training-operator"
            go, cwd, env = golang.find(), paths.TOOLS / "training-operator", golang.environment()
            run([go, "mod", "download", module], cwd=cwd, env=env, timeout=600)
            source = run([go, "list", "-m", "-f", "{{.Dir}}", module], cwd=cwd, env=env).stdout.strip()
            partial = _fresh(place)
            shutil.copytree(Path(source) / "manifests", partial)
            _publish(partial, place)
    return place


def key() -> str:
    """Return a digest of all that the programs are built from."""
    version = ".".join(map(str, golang.version_of(golang.find())))
    return hashlib.sha256("".join(tool.key(version) for tool in ALL.values()).encode()).hexdigest()[:16]


def drop_build_caches() -> None:
    """Remove downloaded modules and compiled objects (about 6 GB): once all programs stand, nothing needs them."""
    folder = paths.cache() / "go"
    if folder.exists():
        with alone("tools"):
            shutil.rmtree(folder)


def _place(tool: Tool, go_version: str) -> Path:
    return paths.cache() / "bin" / tool.name / tool.key(go_version) / tool.name


def _build(go: Path, tool: Tool, place: Path) -> None:
    partial = _fresh(place.parent)
    argv: list[str | Path] = [go, "build", "-o", partial / tool.name, "-ldflags", f"-s -w {tool.ldflags}"]
    if tool.tags:
        argv += ["-tags", tool.tags]
    log = paths.cache() / "logs" / f"build-{tool.name}.log"
    env = golang.environment()
    run(["nice", *argv, tool.package], cwd=paths.TOOLS / tool.group, env=env, timeout=3600, log=log)
    if not (partial / tool.name).exists():
        raise LabError(f"{tool.package} built without a program; see {log}")
    _publish(partial, place.parent)


def _fresh(place: Path) -> Path:
    # Whoever comes here holds the lock, so a partial folder is what a killed build left.
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    return partial


def _publish(partial: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    kept = sorted(place.parent.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)[:2]
    for old in set(place.parent.iterdir()) - {*kept, place}:
        shutil.rmtree(old, ignore_errors=True)
