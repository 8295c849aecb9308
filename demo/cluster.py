"""Which cluster the demonstration runs on, and the one way it talks to it: kubectl, as its reader would."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

NEEDED = ("KUBECONFIG", "REGISTRY", "TRIMTAB_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class DemoError(Exception):
    """Something stands in the way; the message says what, and the one command that shows why."""


@dataclass(frozen=True)
class Cluster:
    """A reachable cluster with its registry and object storage."""

    env: Mapping[str, str]

    @property
    def s3_endpoint(self) -> str:
        """URL of the object storage, as pods and this computer reach it."""
        return self.env["TRIMTAB_S3_ENDPOINT"]

    @property
    def bucket(self) -> str:
        """Bucket for data and artifacts."""
        return self.env.get("TRIMTAB_S3_BUCKET", "trimtab")

    def run(self, *command: str, stdin: str | None = None, timeout: float = 120, check: bool = True) -> str:
        """Run a program with the cluster's environment and return what it printed.

        Raises DemoError with the command and its words when it fails or takes longer than timeout seconds.
        """
        try:
            done = subprocess.run(
                command, env=dict(self.env), input=stdin, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"no answer within {timeout:.0f} s from: {shlex.join(command)}") from error
        if check and done.returncode != 0:
            raise DemoError(f"{shlex.join(command)}\n{done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 120, check: bool = True) -> str:
        """Run kubectl; see run()."""
        return self.run("kubectl", *arguments, stdin=stdin, timeout=timeout, check=check)

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ... -o json`."""
        document: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return document

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """Apply objects that are made here rather than read from a file."""
        body = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))


def connect(start: bool = True) -> Cluster:
    """The cluster that KUBECONFIG and REGISTRY name, else the local one, started if need be.

    Raises DemoError when the environment names a cluster and leaves out what else is needed.
    """
    if start:
        lab("up")
    env = {**os.environ, **exports(lab("env", capture=True))}
    missing = [name for name in NEEDED if not env.get(name)]
    if missing:
        raise DemoError(f"with KUBECONFIG set, set these too: {', '.join(missing)}")
    return Cluster(env)


def lab(*verb: str, capture: bool = False) -> str:
    """Run a verb of the local cluster; its progress goes straight to the terminal unless it is captured."""
    done = subprocess.run(
        [sys.executable, "-m", "lab", *verb],
        cwd=ROOT,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoError(f"python3 -m lab {shlex.join(verb)} failed; see above")
    return done.stdout or ""


def exports(text: str) -> dict[str, str]:
    """Read lines of `export NAME=VALUE` as a shell would, expanding $NAME of the present environment."""
    read: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            read[name] = os.path.expandvars("".join(shlex.split(value)))
    return read
