"""The cluster's image registry: plain HTTP, on the node's address alone. Its layers are a cache and survive `down`."""

import http.client
import json
from pathlib import Path

from lab import builder, network, paths
from lab.process import Process
from lab.report import LabError
from lab.run import run

PORT = 5000
ADDRESS = f"{network.ADDRESS}:{PORT}"
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)


def process(state: Path) -> Process:
    """Return the registry's process."""
    return Process("registry", [state / "bin" / "registry", "serve", _config(state)], state)


def configure(state: Path) -> None:
    """Write its configuration."""
    content = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage_folder())}, "delete": {"enabled": True}},
        "http": {"addr": ADDRESS},
    }
    _config(state).write_text(json.dumps(content))


def storage_folder() -> Path:
    """Return the folder of all pushed layers."""
    return paths.cache() / "registry"


def digest(repository: str, tag: str) -> str | None:
    """Return the digest of a tag's manifest, or None when the registry has no such tag.

    Raises:
        LabError: The registry does not answer.
    """
    connection = http.client.HTTPConnection(ADDRESS, timeout=10)
    try:
        connection.request("HEAD", f"/v2/{repository}/manifests/{tag}", headers={"Accept": _MANIFESTS})
        answer = connection.getresponse()
        return answer.getheader("Docker-Content-Digest") if answer.status == http.client.OK else None
    except OSError as error:
        raise LabError(f"the registry at {ADDRESS} does not answer ({error}); try: python3 -m lab up") from error
    finally:
        connection.close()


def publish(image: str) -> str:
    """Push one of the builder's images unless its tag is there, and return its reference by digest."""
    repository, _, tag = image.removeprefix("localhost/").rpartition(":")
    found = digest(repository, tag)
    if found is None:
        builder.push(image, f"{ADDRESS}/{repository}:{tag}")
        found = digest(repository, tag)
    return f"{ADDRESS}/{repository}@{found}"


def tags(repository: str) -> list[str]:
    """Return a repository's tags, the one that was pushed last first."""
    folder = storage_folder() / "docker/registry/v2/repositories" / repository / "_manifests/tags"
    entries = sorted(folder.iterdir() if folder.exists() else [], key=lambda each: each.stat().st_mtime, reverse=True)
    return [entry.name for entry in entries]


def forget(repository: str, tag: str) -> None:
    """Delete a tag's manifest; `collect` then frees its layers."""
    if (found := digest(repository, tag)) is None:
        return
    connection = http.client.HTTPConnection(ADDRESS, timeout=10)
    try:
        connection.request("DELETE", f"/v2/{repository}/manifests/{found}")
        connection.getresponse().read()
    finally:
        connection.close()


def collect(state: Path) -> None:
    """Free what no manifest needs. Nobody may push meanwhile: the caller holds the lab's lock."""
    run([state / "bin" / "registry", "garbage-collect", "--delete-untagged", _config(state)], timeout=300)


def _config(state: Path) -> Path:
    return state / "registry.yaml"
