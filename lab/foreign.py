"""Somebody else's cluster: with KUBECONFIG (and REGISTRY) set, the same verbs use that one and change nothing of it."""

import os
import shutil
from pathlib import Path

from lab import images, paths, tools
from lab.report import LabError, say, step
from lab.run import run


def named() -> bool:
    """Tell whether the environment names a cluster that is not the lab's own."""
    kubeconfig = os.environ.get("KUBECONFIG")
    return bool(kubeconfig) and Path(str(kubeconfig)) != paths.state() / "admin.kubeconfig"


def reach() -> None:
    """See that the cluster answers and knows PyTorchJobs.

    Raises:
        LabError: It does not; the message says what to look at.
    """
    kubeconfig = os.environ["KUBECONFIG"]
    kubectl = shutil.which("kubectl") or tools.ensure(["kubectl"])["kubectl"]
    answer = run([kubectl, "get", "--raw", "/readyz", "--request-timeout=10s"], check=False, timeout=30)
    if answer.returncode:
        raise LabError(
            f"the cluster that KUBECONFIG={kubeconfig} names does not answer: {answer.stderr.strip()}\n"
            "unset KUBECONFIG to use a local one"
        )
    crd = run([kubectl, "get", "crd", "pytorchjobs.kubeflow.org"], check=False, timeout=30)
    if crd.returncode:
        raise LabError(
            "the cluster has no PyTorchJob: install Kubeflow training-operator "
            f"{tools.TRAINING_OPERATOR} into it ({crd.stderr.strip()})"
        )
    say(f"using the cluster that KUBECONFIG={kubeconfig} names")


def publish() -> dict[str, str]:
    """Build the images with whatever builder is here, push them to REGISTRY, and return their references.

    Raises:
        LabError: REGISTRY is not set, or there is no builder, or it failed.
    """
    target = os.environ.get("REGISTRY", "").rstrip("/")
    if not target:
        raise LabError("set REGISTRY to where the cluster pulls from, such as registry.example.org/team")
    program = next(filter(None, map(shutil.which, ("docker", "podman", "buildah"))), None)
    if program is None:
        raise LabError("no docker, podman or buildah here to build images with")
    found = {}
    for image in images.every(None, images.engine("vllm")):
        reference = f"{target}/trimtab-{image.part}:{image.key()}"
        arguments = [word for key, value in image.arguments for word in ("--build-arg", f"{key}={value}")]
        log = paths.cache() / "logs" / f"image-{image.part}.log"
        with step(f"building and pushing {reference}; follow it: tail -f {log}", image.seconds):
            verb = ["bud", "--layers"] if program.endswith("buildah") else ["build"]
            recipe = ["-t", reference, "-f", image.dockerfile, paths.ROOT]
            run([program, *verb, *arguments, *recipe], timeout=7200, log=log)
            run([program, "push", reference], timeout=7200, log=log)
        found[image.part] = reference
    return found
