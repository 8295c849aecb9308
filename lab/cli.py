"""The verbs of `python3 -m lab`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import paths
from lab.controlplane import ControlPlane
from lab.report import LabError, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, or 1 after an error that has been told on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m lab", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    plane = verbs.add_parser("control-plane", help="etcd and kube-apiserver alone")
    plane.add_argument("direction", choices=["up", "down"])
    plane.add_argument(
        "--state", type=Path, default=paths.state() / "control-plane", help="its folder, default %(default)s"
    )
    plane.add_argument("--controllers", default="", help="controllers to run as well, with commas between")
    plane.set_defaults(run=_control_plane)
    return parser


def _control_plane(arguments: argparse.Namespace) -> None:
    controllers = tuple(filter(None, arguments.controllers.split(",")))
    plane = ControlPlane(arguments.state.resolve(), tied=False, controllers=controllers)
    if arguments.direction == "down":
        plane.stop()
        return
    plane.start()
    say(f"kube-apiserver is ready at {plane.server}")
    print(f"export KUBECONFIG={plane.kubeconfig}")
