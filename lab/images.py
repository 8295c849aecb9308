"""The project's three images, built from its own Dockerfiles and named by what they are built from."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import builder, paths, python_packages, registry, tools
from lab.report import say, step
from lab.run import run

SUITE = "bookworm"
BASE_PACKAGES = ("ca-certificates", "netbase", "python3", "python3-venv", "tzdata")
"""What makes Debian's minimal system stand in for python:3.11-slim-bookworm."""

KEPT = 5
"""How many images of each kind stay: a job goes on with the one that it began with."""

LAYERS_KEPT = 150
"""How many layers of superseded code the builder may hold; they are a megabyte each."""

CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True)
class Image:
    """One image: the folder of its Dockerfile, and what else goes into it."""

    part: str
    folder: str
    needs: tuple[str, ...]
    source: str
    seconds: int
    arguments: tuple[tuple[str, str], ...] = ()

    @property
    def dockerfile(self) -> Path:
        """The recipe."""
        return paths.ROOT / self.folder / "Dockerfile"

    def needs_key(self) -> str:
        """Return a digest of all but our own code: the recipe, the locked packages, the arguments."""
        said = hashlib.sha256(json.dumps(self.arguments).encode() + self.dockerfile.read_bytes())
        for lock in ("image.txt", *self.needs):
            said.update((paths.ROOT / "locks" / lock).read_bytes())
        return said.hexdigest()[:16]

    def key(self) -> str:
        """Return a digest of all that the image is built from: the tag that it gets."""
        said = hashlib.sha256(self.needs_key().encode())
        said.update((paths.ROOT / "pyproject.toml").read_bytes())
        for file in sources(paths.ROOT / "core", paths.ROOT / self.source):
            said.update(str(file.relative_to(paths.ROOT)).encode() + b"\0" + file.read_bytes())
        return said.hexdigest()[:16]


def engine(default: str) -> str:
    """Return the flavour of the server image: vllm, or vllm-cpu for computers without a GPU."""
    return os.environ.get("TRIMTAB_ENGINE") or default


def every(base: str | None, flavour: str) -> tuple[Image, ...]:
    """Return the three images.

    Args:
        base: Image to build upon in place of python:3.11-slim-bookworm.
        flavour: See `engine`.
    """
    python = (("PYTHON_IMAGE", base),) if base else ()
    return (
        Image("operator", "operator", ("operator.txt",), "operator/trimtab_operator", 20, python),
        Image("trainer", "trainer_image", ("torch.txt", "trainer.txt"), "trainer_image/trimtab_trainer", 240, python),
        Image(
            "server", "server_image", ("torch.txt", f"server-{flavour}.txt"), "server_image/trimtab_server", 120,
            (*python, ("ENGINE", flavour)),
        ),
    )  # fmt: skip


def sources(*folders: Path) -> Iterator[Path]:
    """Yield the files that a build sees, in order."""
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                yield file


def publish(state: Path) -> dict[str, str]:
    """Build and push what the lab's registry lacks, and return each image's reference by digest."""
    base = _base()
    wanted = {image: f"trimtab-{image.part}" for image in every(base, engine("vllm-cpu"))}
    found = {}
    for image, repository in wanted.items():
        tag = image.key()
        if registry.digest(repository, tag) is None:
            _build(image, f"localhost/{repository}:{tag}")
            with step(f"pushing {repository}", 60 if not registry.tags(repository) else 0):
                registry.publish(f"localhost/{repository}:{tag}")
        found[image.part] = f"{registry.ADDRESS}/{repository}@{registry.digest(repository, tag)}"
    _prune(state, wanted)
    return found


def built() -> bool:
    """Tell whether the large layers have been built here before."""
    return all(_record(image).exists() for image in every(None, engine("vllm-cpu")))


def _build(image: Image, name: str) -> None:
    if builder.has(name):
        return
    log = paths.cache() / "logs" / f"image-{image.part}.log"
    new = _built(image) != image.needs_key()
    with step(f"building {name.removeprefix('localhost/')}; follow it: tail -f {log}", image.seconds if new else 0):
        arguments = [word for key, value in image.arguments for word in ("--build-arg", f"{key}={value}")]
        if new:
            # buildah mounts an empty folder in the place of a stage that it takes from its cache as a whole.
            arguments += ["--build-arg", f"FRESH={time.time_ns()}"]
        with _host_settings() as mounts:
            builder.buildah(
                "bud", "--layers", "--pull-never", "--network", "host", *mounts, *arguments,
                "-t", name, "-f", image.dockerfile, paths.ROOT, timeout=3600, log=log,
            )  # fmt: skip
    if new:
        # Superseded needs are the only large layers; our own code's are a megabyte each.
        _record(image).write_text(image.needs_key())
    builder.tidy(0 if new else LAYERS_KEPT)


def _built(image: Image) -> str:
    return _record(image).read_text() if _record(image).exists() else ""


def _record(image: Image) -> Path:
    return paths.cache() / "builder" / f"{image.part}.needs"


def _base() -> str:
    """Return a Debian with Python, made by debootstrap unless the builder has it."""
    key = hashlib.sha256(" ".join((SUITE, *BASE_PACKAGES)).encode()).hexdigest()[:16]
    image = f"localhost/python-base:{key}"
    if builder.has(image):
        return image
    with step("making the base image with debootstrap", 70), tempfile.TemporaryDirectory(dir=paths.cache()) as folder:
        root, archive = Path(folder) / "root", Path(folder) / "rootfs.tar"
        log = paths.cache() / "logs" / "debootstrap.log"
        include = f"--include={','.join(BASE_PACKAGES)}"
        run(["nice", "debootstrap", "--variant=minbase", include, SUITE, root, *_mirror()], timeout=900, log=log)
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man"):
            shutil.rmtree(root / waste, ignore_errors=True)
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)
        # Debian calls it python3 alone.
        (root / "usr/bin/python").symlink_to("python3")
        run(["tar", "--numeric-owner", "-C", root, "-cf", archive, "."], timeout=300)
        recipe = Path(folder) / "Dockerfile"
        recipe.write_text('FROM scratch\nADD rootfs.tar /\nCMD ["python3"]\n')
        builder.buildah("bud", "--layers=false", "-t", image, "-f", recipe, folder, timeout=300)
    return image


def _mirror() -> list[str]:
    """Return the mirror that this computer's apt takes the suite from; debootstrap has a default when there is none."""
    targets = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)"], check=False).stdout
    found = [line.split()[0] for line in targets.splitlines() if line.endswith(f" {SUITE} main")]
    return found[:1]


class _host_settings:  # noqa: N801 - used as a function, in a with statement
    """How this computer reaches its package index, lent to a build as mounts that no layer keeps."""

    def __enter__(self) -> list[str]:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        said = run([*python_packages.pip(), "config", "list"]).stdout
        pip, uv = host_configuration(said)
        (folder / "pip.conf").write_text(pip)
        (folder / "uv.toml").write_text(uv)
        pairs = {folder / "pip.conf": "/etc/pip.conf", folder / "uv.toml": "/etc/uv/uv.toml"}
        if CA_BUNDLE.exists():
            pairs[CA_BUNDLE] = str(CA_BUNDLE)
        return [word for source, target in pairs.items() for word in ("--volume", f"{source}:{target}:ro")]

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def host_configuration(pip_config: str) -> tuple[str, str]:
    """Turn what `pip config list` prints into a pip.conf and a uv.toml for a build."""
    values = {}
    for line in pip_config.splitlines():
        name, found, value = line.partition("=")
        if found:
            values[name.rpartition(".")[2]] = value.strip("'\"")
    kept = {name: values[name] for name in ("index-url", "extra-index-url", "proxy", "timeout") if name in values}
    timeout = values.get("default-timeout")
    pip = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in kept.items())
    pip += f"timeout = {timeout}\n" if timeout and "timeout" not in kept else ""
    pip += f"cert = {CA_BUNDLE}\n"
    uv = "system-certs = true\n"
    if "index-url" in kept:
        uv += f"index-url = {json.dumps(kept['index-url'])}\n"
    if "extra-index-url" in kept:
        uv += f"extra-index-url = {json.dumps(kept['extra-index-url'].split())}\n"
    return pip, uv


def _prune(state: Path, wanted: dict[Image, str]) -> None:
    """Drop all but the newest images of each kind, in the builder, the registry and the node."""
    superseded = []
    for image, repository in wanted.items():
        for tag in set(registry.tags(repository)[KEPT:]) - {image.key()}:
            superseded.append(f"{repository}@{registry.digest(repository, tag)}")
            registry.forget(repository, tag)
            builder.buildah("rmi", f"localhost/{repository}:{tag}", check=False)
    if not superseded:
        return
    say(f"pruning {len(superseded)} superseded images")
    registry.collect(state)
    images = [f"{registry.ADDRESS}/{each}" for each in superseded]
    ctr = tools.ensure(["ctr"])["ctr"]
    socket = state / "run" / "containerd.sock"
    run([ctr, "--address", socket, "--namespace", "k8s.io", "images", "rm", *images], check=False)
