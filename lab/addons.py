"""What runs in the cluster from the start: Kubeflow's training-operator, as its own manifests say."""

import json
import shutil
from pathlib import Path

from lab import builder, registry, tools
from lab.controlplane import ControlPlane
from lab.report import say, step

NAMESPACE = "kubeflow"

_APPLETS = (
    "sh cat cp date dd df du echo env false find grep head hostname id kill ln ls mkdir mv nc printf ps pwd rm sed "
)
_APPLETS += "seq sleep sort stat tail tar tee test touch tr true uname vi wc wget which"

# busybox's own exits with 1 as soon as one search domain does not know the name, though another did. Its shell
# prefers its own applets, so this one must be called by its path.
_NSLOOKUP = """\
#!/bin/busybox sh
out=$(/bin/busybox nslookup "$@" 2>&1)
echo "$out"
echo "$out" | /bin/busybox grep -q '^Name:'
"""

# training-operator's own template with the one thing more that the restricted Pod Security profile asks for.
_INIT_CONTAINER = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  command: ["sh", "-c"]
  args:
    - |
      for try in $(seq {{.MaxTries}}); do /bin/nslookup {{.MasterAddr}} && exit 0; sleep 1; done
      echo "{{.MasterAddr}} has no address after {{.MaxTries}} tries"; exit 1
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 32Mi}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    runAsNonRoot: true
    runAsUser: 65534
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
"""


def pause_image() -> str:
    """Return the image of a pod's first container, built unless it is there."""
    binary = tools.ensure(["pause"])["pause"]
    return builder.plain("pause", {"/pause": binary}, ["/pause"])


def busybox_image() -> str:
    """Return an image with a shell, and a /bin/nslookup whose exit code tells the truth."""
    files: dict[str, Path | str] = {
        "/bin/busybox": Path(shutil.which("busybox", path="/bin:/usr/bin") or "/bin/busybox"),
        "/bin/nslookup": _NSLOOKUP,
    }
    links = {f"/bin/{applet}": "busybox" for applet in _APPLETS.split()}
    return builder.plain("busybox", files, ["/bin/sh"], links)


def training_operator_image() -> str:
    """Return training-operator's image: its program and nothing else."""
    binary = tools.ensure(["training-operator"])["training-operator"]
    return builder.plain("training-operator", {"/manager": binary}, ["/manager"])


def install(plane: ControlPlane) -> None:
    """Apply training-operator; `wait` waits for it."""
    say("installing training-operator")
    folder = plane.state / "training-operator"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tools.manifests(), folder / "manifests")
    image = registry.publish(training_operator_image())
    init = registry.publish(busybox_image())
    _kustomize(folder, image, init)
    objects = plane.kubectl("kustomize", str(folder))
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=objects)


def ready(plane: ControlPlane) -> bool:
    """Tell whether training-operator is there and ready."""
    words = [
        "get",
        "deployment",
        "training-operator",
        "--namespace",
        NAMESPACE,
        "-o",
        "jsonpath={.status.readyReplicas}",
    ]
    return plane.kubectl(*words, check=False) == "1"


def wait(plane: ControlPlane) -> None:
    """Wait until training-operator is ready and its webhook has a backend.

    Raises:
        LabError: It was not within three minutes.
    """
    with step("waiting for training-operator", 20):
        words = ["rollout", "status", "deployment/training-operator", "--namespace", NAMESPACE, "--timeout=180s"]
        plane.kubectl(*words, timeout=190)


def _kustomize(folder: Path, image: str, init_image: str) -> None:
    (folder / "initContainer.yaml").write_text(_INIT_CONTAINER)
    flags = [
        "--enable-scheme=pytorchjob",
        f"--pytorch-init-container-image={init_image}",
        "--pytorch-init-container-template-file=/etc/config/initContainer.yaml",
    ]
    container = "/spec/template/spec/containers/0"
    patch = [
        {"op": "replace", "path": f"{container}/image", "value": image},
        {"op": "add", "path": f"{container}/args", "value": flags},
        {"op": "add", "path": f"{container}/volumeMounts/-", "value": {"name": "config", "mountPath": "/etc/config"}},
        {"op": "add", "path": "/spec/template/spec/volumes/-",
         "value": {"name": "config", "configMap": {"name": "training-operator-config"}}},
        # The shipped probe first asks after ten seconds; a newcomer watches this one start.
        {"op": "add", "path": f"{container}/readinessProbe/initialDelaySeconds", "value": 1},
        {"op": "add", "path": f"{container}/readinessProbe/periodSeconds", "value": 2},
    ]  # fmt: skip
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["manifests/overlays/standalone"],
        "configMapGenerator": [{"name": "training-operator-config", "files": ["initContainer.yaml"]}],
        "patches": [{"target": {"kind": "Deployment"}, "patch": json.dumps(patch)}],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(overlay, indent=2))
