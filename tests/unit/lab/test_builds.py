"""What is built is named by what it is built from, and everything is pinned once."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lab import images, paths, tools

LOCKS = paths.ROOT / "locks"


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ \\]+)", (LOCKS / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("tool", tools.ALL.values(), ids=lambda tool: tool.name)
def test_every_program_is_a_tool_of_its_module(tool: tools.Tool) -> None:
    if tool.package != ".":
        assert re.search(
            rf"^(tool |\t){re.escape(tool.package)}$", (paths.TOOLS / tool.group / "go.mod").read_text(), re.M
        )


def test_the_version_that_the_server_names_is_the_one_that_is_built() -> None:
    module = (paths.TOOLS / "kubernetes" / "go.mod").read_text()
    assert f"k8s.io/kubernetes {tools.KUBERNETES}" in module
    staging = tools.KUBERNETES.replace("v1.", "v0.")
    replaced = re.findall(r"^\t(k8s\.io/\S+) => \1 (\S+)$", module, re.M)
    assert len(replaced) == 33
    assert {version for _, version in replaced} == {staging}


def test_a_program_is_built_again_when_anything_of_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(paths.TOOLS / "pause", tmp_path / "pause")
    monkeypatch.setattr(paths, "TOOLS", tmp_path)
    tool = tools.ALL["pause"]
    keys = {tool.key("1.26.8"), tool.key("1.26.9"), replace(tool, ldflags="-X a=b").key("1.26.8")}
    (tmp_path / "pause" / "main.go").write_text("package main")
    keys.add(tool.key("1.26.8"))
    assert len(keys) == 4


def test_trainer_and_server_begin_alike_so_that_they_share_the_torch_layer() -> None:
    heads = [
        (paths.ROOT / folder / "Dockerfile").read_text().partition("# -----")[0]
        for folder in ("trainer_image", "server_image")
    ]
    assert heads[0] == heads[1]
    assert "locks/torch.txt" in heads[0]


@pytest.mark.parametrize("lock", ["trainer.txt", "server-vllm.txt", "server-vllm-cpu.txt"])
def test_no_later_layer_replaces_what_the_torch_layer_holds(lock: str) -> None:
    # setuptools: the CPU engine asks for an older one; it is small.
    torch = {name: version for name, version in pins("torch.txt").items() if name != "setuptools"}
    assert {name: pins(lock).get(name) for name in torch} == torch


@pytest.mark.parametrize("image", images.every("localhost/base:1", "vllm-cpu"), ids=lambda image: image.part)
def test_the_last_layer_is_our_wheel_alone(image: images.Image) -> None:
    instructions = [line for line in image.dockerfile.read_text().splitlines() if re.match(r"[A-Z]+ ", line)]
    assert instructions[-1].startswith("COPY --from=wheel ")
    assert "USER 1000:1000" in instructions


def test_an_image_is_named_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = ("pyproject.toml", "locks", "core", "operator/Dockerfile")
    for name in wanted:
        source, target = paths.ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    code = tmp_path / "operator" / "trimtab_operator" / "main.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    image = images.every("localhost/base:1", "vllm-cpu")[0]
    before = image.key(), image.needs_key()
    assert before == (image.key(), image.needs_key())
    (code.parent / "main.cpython-311.pyc").write_text("compiled")
    assert image.key() == before[0]
    code.write_text("print()")
    assert image.key() != before[0]
    assert image.needs_key() == before[1], "a change of code must not rebuild what it needs"
    (tmp_path / "locks" / "operator.txt").write_text("")
    assert image.needs_key() != before[1]


def test_how_this_computer_reaches_its_index_is_lent_to_builds() -> None:
    said = "global.index-url='https://mirror.example/simple'\n:env:.default-timeout='180'\nglobal.cert='/etc/x.pem'\n"
    pip, uv = images.host_configuration(said)
    assert pip == (
        "[global]\nindex-url = https://mirror.example/simple\ntimeout = 180\n"
        "cert = /etc/ssl/certs/ca-certificates.crt\n"
    )
    assert uv == 'system-certs = true\nindex-url = "https://mirror.example/simple"\n'
