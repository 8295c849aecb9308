"""The verbs of `python3 -m lab`."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import foreign, paths, tools
from lab.cluster import Cluster
from lab.controlplane import ControlPlane
from lab.report import LabError, say
from lab.run import SYSTEM_PATH

_CONTROL_PLANE = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "helm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, or 1 after an error that has been told on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Whoever read has seen enough.
    except KeyboardInterrupt:
        print("lab: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m lab", description="A real one-node Kubernetes on this computer.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, does: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=does)
        return added

    verb("up", _up, "start the cluster, or bring it back from whatever is there")
    verb("down", _down, "end and remove everything but the caches")
    verb("env", _env, "print the exports that reach the cluster")
    verb("images", _images, "build and push what is missing of the three images, and print their references")
    verb("status", _status, "say what runs and what it takes")
    verb("build", _build, "build the programs").add_argument(
        "what", nargs="?", choices=["control-plane", "all"], default="all"
    )
    for name, does, text in (
        ("logs", _logs, "print the last lines of a host process's log"),
        ("stop", _stop, "stop a host process, for tests of faults"),
        ("start", _start, "start it again"),
    ):
        verb(name, does, text).add_argument("name")
    for name in ("kubectl", "helm"):
        passed = verb(name, _pass_on, f"run {name} on the cluster")
        passed.add_argument("words", nargs=argparse.REMAINDER)
        passed.set_defaults(program=name)
    plane = verb("control-plane", _control_plane, "etcd and kube-apiserver alone")
    plane.add_argument("direction", choices=["up", "down"])
    beside = paths.state().with_name(f"{paths.state().name}-control-plane")
    plane.add_argument("--state", type=Path, default=beside, help="its folder, default %(default)s")
    plane.add_argument("--controllers", default="", help="controllers to run as well, with commas between")
    return parser


def _up(_: argparse.Namespace) -> None:
    if foreign.named():
        foreign.reach()
    else:
        Cluster().up()


def _down(_: argparse.Namespace) -> None:
    if foreign.named():
        say("KUBECONFIG names a cluster that is not the lab's: left as it is")
        return
    Cluster().down()


def _images(_: argparse.Namespace) -> None:
    references = foreign.publish() if foreign.named() else Cluster().images()
    for part, reference in references.items():
        print(f"{part}={reference}")


def _env(_: argparse.Namespace) -> None:
    if foreign.named():
        for name in ("KUBECONFIG", "REGISTRY"):
            print(f"export {name}={shlex.quote(os.environ.get(name, ''))}")
        return
    cluster = Cluster()
    cluster.require()
    for name, value in cluster.exports().items():
        print(f"export {name}={value}")


def _status(_: argparse.Namespace) -> None:
    for line in Cluster().status():
        print(line)


def _build(arguments: argparse.Namespace) -> None:
    tools.ensure(_CONTROL_PLANE if arguments.what == "control-plane" else tuple(tools.ALL))
    tools.manifests()


def _logs(arguments: argparse.Namespace) -> None:
    log = paths.state() / "logs" / f"{arguments.name}.log"
    if not log.exists():
        known = ", ".join(sorted(each.stem for each in log.parent.glob("*.log")))
        raise LabError(f"there is no {log}; logs there are: {known or 'none'}")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "200", str(log)])  # noqa: S606


def _stop(arguments: argparse.Namespace) -> None:
    Cluster().service(arguments.name).process.stop()


def _start(arguments: argparse.Namespace) -> None:
    Cluster().service(arguments.name).start()


def _pass_on(arguments: argparse.Namespace) -> None:
    program = tools.ensure([arguments.program])[arguments.program]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"}
    if not os.environ.get("KUBECONFIG"):
        environment["KUBECONFIG"] = str(Cluster().plane.kubeconfig)
    os.execve(program, [arguments.program, *arguments.words], environment)  # noqa: S606


def _control_plane(arguments: argparse.Namespace) -> None:
    controllers = tuple(filter(None, arguments.controllers.split(",")))
    plane = ControlPlane(arguments.state.resolve(), tied=False, controllers=controllers)
    if arguments.direction == "down":
        plane.stop()
        return
    plane.start()
    say(f"kube-apiserver is ready at {plane.server}")
    print(f"export KUBECONFIG={plane.kubeconfig}")
