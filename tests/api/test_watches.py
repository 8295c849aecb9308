"""What no watch told: a line that is cut, an API server that starts again and knows no old version (410 Gone), and
connections that go dead without a word. In each, things are changed that nobody sees change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.controlplane import ControlPlane
from tests.api.client import Api
from tests.api.conftest import kinds_of
from tests.api.stage import SETTINGS, OperatorProcess, eventually
from tests.api.training import Training
from tests.api.wire import Wire, wired

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def own_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that may be stopped: nobody else's tests run on it."""
    with ControlPlane(tmp_path_factory.mktemp("own-plane"), controllers=("garbage-collector-controller",)) as running:
        kinds_of(running)
        yield running


@pytest.fixture
def wire(own_plane: ControlPlane, tmp_path: Path) -> Iterator[tuple[Wire, Path]]:
    with wired(own_plane.kubeconfig, own_plane.server, tmp_path) as made:
        yield made


@pytest.fixture
def operator(wire: tuple[Wire, Path], tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator at the end of the wire; once cut off it may complain, but not fail."""
    process = OperatorProcess(wire[1], tmp_path / "operator", settings={**SETTINGS, "resyncSeconds": 3600})
    process.start()
    yield process
    process.kill()
    assert "this is a fault of the operator" not in process.log()


@pytest.fixture
def stage(own_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Training]:
    """A namespace of its own."""
    api = Api(own_plane)
    name = f"t-{request.node.name.replace('_', '-')[:40].strip('-')}"
    assert api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}}).accepted
    yield Training(api, name)
    api.close()


def running(stage: Training, name: str) -> None:
    """A job whose gang runs."""
    stage.apply(name)
    stage.check(name)
    stage.gang(name)
    stage.until(name, "Running")


def change_everything(stage: Training) -> None:
    """A gang is deleted, its job's run.json too, a job comes, another goes while its pod is held."""
    stage.delete("PyTorchJob", "loses-its-gang-1")
    stage.delete("ConfigMap", "loses-its-map-1-run")
    stage.delete("FineTuneJob", "goes")
    stage.apply("comes")


def until_everything_is_seen(stage: Training, deadline: float) -> None:
    """Each of these changes had its consequence."""
    stage.until_there("ConfigMap", "loses-its-map-1-run", deadline)
    stage.until_there("Job", "comes-preflight", deadline)
    stage.until_gone("Pod", "goes-1-master-0", deadline)

    def ending() -> bool:
        (first,) = stage.told("loses-its-gang")["attempts"]
        return bool(first.get("reason") == "Preempted")

    eventually(ending, lambda: stage.told("loses-its-gang"), deadline)


def before(stage: Training) -> None:
    for name in ("loses-its-gang", "loses-its-map", "goes"):
        running(stage, name)


def test_what_happens_while_the_line_is_cut_is_seen_afterwards(
    stage: Training, operator: OperatorProcess, wire: tuple[Wire, Path]
) -> None:
    before(stage)
    wire[0].cut()
    change_everything(stage)
    wire[0].mend()
    until_everything_is_seen(stage, 60)


def test_an_api_server_that_has_forgotten_the_version_is_listed_anew(
    stage: Training, operator: OperatorProcess, wire: tuple[Wire, Path], own_plane: ControlPlane
) -> None:
    before(stage)
    old = stage.api.request("GET", "/apis/trimtab.dev/v1alpha1/finetunejobs").body["metadata"]["resourceVersion"]
    wire[0].cut()
    change_everything(stage)
    own_plane.stop_apiserver()
    own_plane.start_apiserver()
    stage.api.close()  # the server that answered on it is gone
    eventually(lambda: code_of_a_watch(stage, old) == 410, lambda: code_of_a_watch(stage, old))
    wire[0].mend()
    until_everything_is_seen(stage, 90)


def code_of_a_watch(stage: Training, version: str) -> int:
    """What the API server says to somebody who would go on from this version; 429 until it has started up."""
    path = "/apis/trimtab.dev/v1alpha1/finetunejobs"
    answer = stage.api.request("GET", path, watch="1", resourceVersion=version, timeoutSeconds="1")
    found: int = answer.body.get("object", answer.body)["code"]
    return found


def test_connections_that_go_dead_without_a_word_are_made_up_for(
    stage: Training, operator: OperatorProcess, wire: tuple[Wire, Path]
) -> None:
    before(stage)
    operator.kill()
    operator.settings["resyncSeconds"] = 10
    operator.start()
    stage.apply("first")
    stage.until_there("Job", "first-preflight", 40)  # its watches stand
    wire[0].numb()
    change_everything(stage)
    until_everything_is_seen(stage, 120)
