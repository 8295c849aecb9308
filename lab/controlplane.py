"""etcd and kube-apiserver: all that a controller's tests need, several side by side, ready in seconds.

with ControlPlane(folder) as plane:
    plane.kubectl("apply", "-f", "crds/")
    kubeconfig = plane.service_account_kubeconfig("trimtab-system", "trimtab-operator")
"""

import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lab import kubeconfig, ports, tools
from lab.pki import Authority
from lab.process import Process
from lab.run import run

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass
class ControlPlane:
    """A Kubernetes API server with its etcd, on this computer's loopback unless told otherwise.

    Args:
        state: Folder of its own for keys, data and logs; `stop` leaves only the logs.
        address: Where the API server listens and is reached.
        port: Its port; 0 takes a free one.
        tied: Whether both die with this process, however it ends. Right for tests.
        durable: Whether etcd waits for the disk. Needed only when the computer itself may fall.
        admission_off: Admission plug-ins to switch off. ServiceAccount is by default: nothing makes the
            accounts' namespaces' defaults here, so a Pod without one would be refused.
        controllers: Controllers of kube-controller-manager to run as well, such as
            `garbage-collector-controller` and `namespace-controller`; none means that it is not started.
        flags: Further flags of kube-apiserver.
    """

    state: Path
    address: str = "127.0.0.1"
    port: int = 0
    tied: bool = True
    durable: bool = False
    admission_off: Sequence[str] = ("ServiceAccount",)
    controllers: Sequence[str] = ()
    flags: Sequence[str] = ()
    started: dict[str, Process] = field(default_factory=dict)

    @property
    def authority(self) -> Authority:
        """Who signs this cluster's certificates."""
        return Authority(self.state / "pki")

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.state / "admin.kubeconfig"

    @property
    def server(self) -> str:
        """The API server's URL."""
        return f"https://{self.address}:{self._ports()['api']}"

    def __enter__(self) -> "ControlPlane":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start what does not run and wait until the API server is ready.

        Raises:
            LabError: A program could not be built or did not become ready; the message holds its last lines.
        """
        names = ["etcd", "kube-apiserver", "kubectl", *(["kube-controller-manager"] if self.controllers else [])]
        self.state.mkdir(parents=True, exist_ok=True)
        tools.link(names, self.state / "bin")
        self._issue()
        self.start_etcd()
        self.start_apiserver()
        if self.controllers:
            self._controller_manager().start()

    def stop(self) -> None:
        """End all three and remove data and keys."""
        # etcd last: an API server that loses it stays, answering errors, and no longer heeds SIGTERM.
        self._controller_manager().stop(grace=1)
        self.stop_apiserver()
        self.stop_etcd()
        forget(self.state)

    def start_etcd(self) -> None:
        """Start etcd with the data that it has."""
        etcd = self._etcd()
        etcd.start()
        health = f"http://127.0.0.1:{self._ports()['etcd']}/health"
        etcd.wait(lambda: _answers(health, None), timeout=30)

    def stop_etcd(self) -> None:
        """End etcd; its data stay."""
        self._etcd().stop(grace=2)

    def start_apiserver(self) -> None:
        """Start the API server on its old port and wait until it is ready."""
        server = self._apiserver()
        server.start()
        server.wait(self.ready, timeout=60)

    def stop_apiserver(self) -> None:
        """End the API server. It would drain its watches for a minute, which nobody here waits for."""
        self._apiserver().stop(grace=1)

    def ready(self) -> bool:
        """Tell whether the API server says that it is ready."""
        if not self.authority.certificate.exists():
            return False
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        admin = self.authority.issue("admin", "/O=system:masters/CN=admin")
        context.load_cert_chain(admin.certificate, admin.key)
        return _answers(f"{self.server}/readyz", context)

    def kubectl(self, *words: str, stdin: str | None = None, timeout: float = 60, check: bool = True) -> str:
        """Run kubectl as administrator and return what it printed.

        Raises:
            LabError: It failed; the message holds its words.
        """
        argv = [self.state / "bin" / "kubectl", "--kubeconfig", self.kubeconfig, *words]
        cache = {"KUBECACHEDIR": str(self.state / "kubectl-cache")}
        return run(argv, stdin=stdin, timeout=timeout, check=check, env=cache).stdout

    def service_account_kubeconfig(self, namespace: str, name: str, path: Path | None = None) -> Path:
        """Write a kubeconfig with which a program has exactly a ServiceAccount's rights, valid for a day.

        The namespace and the account are made if they are missing; its roles are the caller's to apply.
        """
        for manifest in (
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}},
        ):
            self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))
        token = self.kubectl("create", "token", name, "--namespace", namespace, "--duration", "24h").strip()
        path = path or self.state / f"{namespace}.{name}.kubeconfig"
        user = kubeconfig.by_token(token)
        return kubeconfig.write(path, self.server, self.authority.certificate, user, namespace)

    def user_kubeconfig(self, name: str, subject: str) -> Path:
        """Write a kubeconfig for a user by certificate, such as `/CN=system:kube-scheduler`."""
        pair = self.authority.issue(name, subject)
        path = self.state / f"{name}.kubeconfig"
        return kubeconfig.write(path, self.server, self.authority.certificate, kubeconfig.by_certificate(pair))

    def _issue(self) -> None:
        self.authority.create()
        names = (
            f"IP:{self.address},IP:127.0.0.1,IP:{SERVICE_ADDRESS},DNS:localhost,DNS:kubernetes,"
            "DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
        )
        self.authority.issue("apiserver", "/CN=kube-apiserver", names)
        self.user_kubeconfig("admin", "/O=system:masters/CN=admin")

    def _ports(self) -> dict[str, int]:
        file = self.state / "ports.json"
        if not file.exists():
            etcd, peer, manager, api = ports.free(4)
            chosen = {"etcd": etcd, "peer": peer, "manager": manager, "api": self.port or api}
            self.state.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(chosen))
        found: dict[str, int] = json.loads(file.read_text())
        return found

    def _process(self, name: str, *flags: str) -> Process:
        if name not in self.started:
            self.started[name] = Process(name, [self.state / "bin" / name, *flags], self.state, tied=self.tied)
        return self.started[name]

    def _etcd(self) -> Process:
        client = f"http://127.0.0.1:{self._ports()['etcd']}"
        peer = f"http://127.0.0.1:{self._ports()['peer']}"
        return self._process(
            "etcd", "--name=lab", f"--data-dir={self.state / 'etcd'}", f"--initial-cluster=lab={peer}",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            "--log-level=warn", *([] if self.durable else ["--unsafe-no-fsync"]),
        )  # fmt: skip

    def _apiserver(self) -> Process:
        pki = self.authority.folder
        return self._process(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._ports()['etcd']}",
            f"--bind-address={self.address}", f"--advertise-address={self.address}",
            f"--secure-port={self._ports()['api']}",
            f"--client-ca-file={self.authority.certificate}",
            f"--tls-cert-file={pki / 'apiserver.crt'}", f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={self.authority.token_key}",
            f"--service-account-signing-key-file={self.authority.token_key}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            *([f"--disable-admission-plugins={','.join(self.admission_off)}"] if self.admission_off else []),
            "--profiling=false", *self.flags,
        )  # fmt: skip

    def _controller_manager(self) -> Process:
        return self._process(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}", "--bind-address=127.0.0.1",
            f"--secure-port={self._ports()['manager']}", "--leader-elect=false",
            f"--controllers={','.join(self.controllers)}",
        )  # fmt: skip


def forget(state: Path) -> None:
    """Remove everything of a stopped control plane but its logs."""
    for entry in state.iterdir() if state.exists() else []:
        if entry.name == "logs":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _answers(url: str, context: ssl.SSLContext | None) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2, context=context) as answer:  # noqa: S310 (our own server)
            return bool(answer.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False
    except OSError:
        return False
