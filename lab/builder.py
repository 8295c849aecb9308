"""buildah, with a store of its own in the cache; and images that are nothing but a few files."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import paths
from lab.run import run

RUNTIME = Path("/run/trimtab-builder")
"""Locks and mounts of the builder: worthless after a reboot, removed by `down`."""


def buildah(*words: object, timeout: float = 120, log: Path | None = None, check: bool = True) -> str:
    """Run buildah on the lab's store and return what it printed.

    Raises:
        LabError: It failed; the message holds its last words.
    """
    policy = paths.cache() / "builder" / "policy.json"
    if not policy.exists():
        policy.parent.mkdir(parents=True, exist_ok=True)
        policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    store = ["--root", store_folder(), "--runroot", RUNTIME, "--storage-driver", "overlay"]
    verb, *rest = words
    trusting = ["--signature-policy", policy] if verb in ("bud", "push", "from", "commit") else []
    env = {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(paths.cache() / "builder")}
    return run(
        ["nice", "buildah", *store, verb, *trusting, *rest], timeout=timeout, log=log, check=check, env=env
    ).stdout


def store_folder() -> Path:
    """Return the folder of the builder's images and layers."""
    return paths.cache() / "builder" / "storage"


def has(image: str) -> bool:
    """Tell whether the builder's store holds an image."""
    return image in names()


def names() -> set[str]:
    """Return the names of all images in the builder's store."""
    if not store_folder().exists():
        return set()
    return set(buildah("images", "--all", "--format", "{{.Name}}:{{.Tag}}").split())


def tidy(most: int) -> None:
    """Drop layers that no named image stands on, once there are more images than `most`."""
    if len(buildah("images", "--all", "--quiet").split()) > most:
        buildah("rmi", "--prune", check=False)


def plain(
    name: str, files: Mapping[str, Path | str], entrypoint: Sequence[str], links: Mapping[str, str] | None = None
) -> str:
    """Return an image that holds these files and nothing else, built unless it is there.

    Args:
        name: Its repository; the tag is the digest of its content.
        files: By absolute path: a file to copy, or a script's text. All become executable.
        entrypoint: What it runs.
        links: Symbolic links, by absolute path.
    """
    said = hashlib.sha256(json.dumps([list(entrypoint), sorted((links or {}).items())]).encode())
    for path, content in sorted(files.items()):
        data = content.read_bytes() if isinstance(content, Path) else content.encode()
        said.update(path.encode() + b"\0" + hashlib.sha256(data).digest())
    image = f"localhost/{name}:{said.hexdigest()[:16]}"
    if has(image):
        return image
    with tempfile.TemporaryDirectory(dir=_temporary()) as folder:
        root = Path(folder) / "root"
        for path, content in files.items():
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_text(content)
            target.chmod(0o755)
        for path, to in (links or {}).items():
            (root / path.lstrip("/")).symlink_to(to)
        recipe = Path(folder) / "Dockerfile"
        recipe.write_text(f"FROM scratch\nCOPY root /\nENTRYPOINT {json.dumps(list(entrypoint))}\n")
        buildah("bud", "--layers=false", "-q", "-t", image, "-f", recipe, folder, timeout=300)
    return image


def push(image: str, reference: str) -> None:
    """Copy an image into a registry that speaks plain HTTP; layers that it has are not sent again."""
    # zstd at its fastest: two thirds of the time of gzip there and back, and a third of the space of nothing.
    quick = ["--compression-format", "zstd", "--compression-level", "1"]
    buildah("push", "-q", "--tls-verify=false", *quick, image, f"docker://{reference}", timeout=1200)


def _temporary() -> Path:
    folder = paths.cache() / "builder"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
