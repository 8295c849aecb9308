"""Kubeconfig files: JSON, which every reader of YAML takes."""

import json
from pathlib import Path

from lab.pki import Pair


def write(path: Path, server: str, authority: Path, user: dict[str, str], namespace: str = "default") -> Path:
    """Write a kubeconfig with one cluster and one user, readable by its owner alone, and return its path."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority": str(authority)}}],
        "users": [{"name": "lab", "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": namespace}}],
        "current-context": "lab",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=2))
    return path


def by_certificate(pair: Pair) -> dict[str, str]:
    """Return the user entry for a client certificate."""
    return {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}


def by_token(token: str) -> dict[str, str]:
    """Return the user entry for a bearer token."""
    return {"token": token}
