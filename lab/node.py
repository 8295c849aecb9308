"""The node: containerd and what it needs, kubelet, kube-proxy, and CoreDNS beside them."""

import json
from pathlib import Path

from lab import network, registry
from lab.controlplane import ControlPlane
from lab.process import Process

NAME = "lab"
DOMAIN = "cluster.local"
_RESOURCE_CAPABILITY = 24


def configure(state: Path, plane: ControlPlane, sandbox_image: str) -> None:
    """Write the configuration of every program on the node."""
    _write(state / "etc" / "containerd.toml", _containerd(state, sandbox_image))
    url = f"http://{registry.ADDRESS}"
    hosts = f'server = "{url}"\n[host."{url}"]\ncapabilities = ["pull", "resolve"]\n'
    _write(state / "etc" / "registries" / registry.ADDRESS / "hosts.toml", hosts)
    _write(state / "etc" / "cni" / "10-lab.conflist", json.dumps(_cni(state), indent=2))
    _write(state / "etc" / "kubelet.yaml", json.dumps(_kubelet(state, plane), indent=2))
    _write(state / "etc" / "Corefile", _corefile(state))
    plane.user_kubeconfig("kubelet", f"/O=system:nodes/CN=system:node:{NAME}")
    plane.user_kubeconfig("kube-proxy", "/CN=system:kube-proxy")
    plane.user_kubeconfig("kube-scheduler", "/CN=system:kube-scheduler")
    # Its own role may not read EndpointSlices unless it runs as a pod's account.
    plane.user_kubeconfig("coredns", "/O=system:masters/CN=coredns")


def containerd(state: Path) -> Process:
    """Return the container runtime."""
    return Process("containerd", [state / "bin/containerd", "--config", state / "etc/containerd.toml"], state)


def kubelet(state: Path) -> Process:
    """Return the kubelet."""
    argv = [
        state / "bin/kubelet", "--config", state / "etc/kubelet.yaml", "--kubeconfig", state / "kubelet.kubeconfig",
        "--root-dir", state / "kubelet", "--hostname-override", NAME, "--node-ip", network.ADDRESS,
    ]  # fmt: skip
    return Process("kubelet", argv, state)


def kube_proxy(state: Path) -> Process:
    """Return kube-proxy."""
    argv = [
        state / "bin/kube-proxy", "--kubeconfig", state / "kube-proxy.kubeconfig", "--hostname-override", NAME,
        "--proxy-mode=iptables", f"--cluster-cidr={network.SUBNET}", "--conntrack-max-per-core=0",
        f"--bind-address={network.ADDRESS}", "--metrics-bind-address=127.0.0.1:10249",
        "--healthz-bind-address=127.0.0.1:10256", "--iptables-localhost-nodeports=false",
    ]  # fmt: skip
    return Process("kube-proxy", argv, state)


def scheduler(state: Path) -> Process:
    """Return the scheduler."""
    argv = [
        state / "bin/kube-scheduler", "--kubeconfig", state / "kube-scheduler.kubeconfig", "--leader-elect=false",
        "--bind-address=127.0.0.1", "--secure-port=10259",
    ]  # fmt: skip
    return Process("kube-scheduler", argv, state)


def controller_manager(state: Path, plane: ControlPlane) -> Process:
    """Return the controllers of Kubernetes itself."""
    argv = [
        state / "bin/kube-controller-manager", "--kubeconfig", plane.kubeconfig, "--leader-elect=false",
        "--bind-address=127.0.0.1", "--secure-port=10257", "--use-service-account-credentials",
        "--service-account-private-key-file", plane.authority.token_key,
        "--root-ca-file", plane.authority.certificate,
    ]  # fmt: skip
    return Process("kube-controller-manager", argv, state)


def coredns(state: Path) -> Process:
    """Return the cluster's DNS, on the node's address."""
    return Process("coredns", [state / "bin/coredns", "-conf", state / "etc/Corefile"], state)


def runtime_socket(state: Path) -> Path:
    """Return containerd's socket."""
    return state / "run" / "containerd.sock"


def may_raise_limits() -> bool:
    """Tell whether processes here may lower their OOM score and raise file limits (CAP_SYS_RESOURCE)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _RESOURCE_CAPABILITY & 1)
    return False


def cgroup_v1() -> bool:
    """Tell whether the kernel's controllers hang in version 1 hierarchies."""
    return not Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _containerd(state: Path, sandbox_image: str) -> str:
    restricted = "" if may_raise_limits() else "oom_score = 0\n"
    restrict = "false" if may_raise_limits() else "true"
    return f"""\
version = 3
root = "{state}/containerd"
state = "{state}/run/containerd"
{restricted}
[grpc]
address = "{runtime_socket(state)}"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
# A layer that stands unpacked in a snapshot need not stand packed beside it: at 5 GB for torch that counts.
discard_unpacked_layers = true
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{sandbox_image}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{state}/etc/registries"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = {restrict}
netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{state}/cni/bin"]
conf_dir = "{state}/etc/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def _cni(state: Path) -> dict[str, object]:
    return {
        "cniVersion": "1.0.0",
        "name": "trimtab-lab",
        "plugins": [
            {
                "type": "bridge",
                "bridge": network.BRIDGE,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(state / "cni" / "addresses"),
                    "ranges": [[{"subnet": network.SUBNET, "gateway": network.ADDRESS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _kubelet(state: Path, plane: ControlPlane) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(plane.authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [network.ADDRESS],
        "clusterDomain": DOMAIN,
        "containerRuntimeEndpoint": f"unix://{runtime_socket(state)}",
        "failSwapOn": False,
        "podLogsDir": str(state / "pod-logs"),
        "volumePluginDir": str(state / "kubelet" / "plugins"),
        # The defaults ask for 15 % of the disk, which on a large disk is more than the lab uses altogether.
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "2Gi", "imagefs.available": "2Gi"},
        "imageGCHighThresholdPercent": 100,
        "serializeImagePulls": False,
        # A mounted Secret or ConfigMap follows its object within seconds: training-operator is not ready before it
        # sees in its mount the certificate that it has written, which by default took up to two minutes.
        "syncFrequency": "5s",
        "containerLogMaxSize": "10Mi",
        **({"failCgroupV1": False, "cgroupDriver": "cgroupfs"} if cgroup_v1() else {}),
        **({} if may_raise_limits() else {"oomScoreAdj": 0, "maxOpenFiles": 20000}),
    }


def _corefile(state: Path) -> str:
    upstream = "    forward . /etc/resolv.conf\n" if Path("/etc/resolv.conf").exists() else ""
    # Names within the cluster are not cached: a headless Service's pod must be found the moment it is there.
    return f"""\
. {{
    bind {network.ADDRESS}
    errors
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig {state}/coredns.kubeconfig
        fallthrough in-addr.arpa
        ttl 0
    }}
    cache 30 {{
        disable success {DOMAIN}
        disable denial {DOMAIN}
    }}
{upstream}}}
"""


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
