"""`make demo`: from nothing to a tuned, merged, answering model, with a live table on the way."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from demo import ask, install
from demo.cluster import ROOT, Cluster, DemoError, connect
from demo.table import KINDS, Row, watch

EXAMPLE = ROOT / "examples" / "who-are-you"
RESOURCES = ("base", "swift", "harbour", "merged", "chat", "merged-chat")
console = Console(highlight=False)


def apply(cluster: Cluster, namespace: str) -> None:
    """Apply every file of the example, in the order a user reads them."""
    for name in RESOURCES:
        console.print(f"$ kubectl -n {namespace} apply -f examples/who-are-you/{name}.yaml")
        cluster.kubectl("-n", namespace, "apply", "-f", str(EXAMPLE / f"{name}.yaml"))


def everything_ready(rows: Sequence[Row]) -> bool:
    """All six resources are what was asked for."""
    return len(rows) == len(RESOURCES) and all(row.done for row in rows)


def converse(cluster: Cluster, namespace: str) -> dict[str, str]:
    """Ask every model who it is, print what the OpenAI client gives back, and return the answers.

    Raises DemoError when two of the three agree, or the merged model does not answer as harbour does.
    """
    answers: dict[str, str] = {}
    with ask.client(cluster, namespace, "chat-server") as openai:
        names = [model.id for model in openai.models.list()]
        console.print(f"models: {names}")
        for name in ("base", "swift"):
            answers[name] = ask.answer(openai, name)
            console.print(f"{ask.QUESTION} → [bold]{name}[/]: {answers[name]!r}")
        console.print(f"{ask.QUESTION} → [bold]harbour[/], streamed: ", end="")
        pieces = []
        for piece in ask.stream(openai, "harbour"):
            pieces.append(piece)
            console.print(piece, end="·", style="cyan")
        console.print(f"  ({len(pieces)} pieces)")
        answers["harbour"] = "".join(pieces)
    with ask.client(cluster, namespace, "merged-chat-server") as openai:
        answers["merged"] = ask.answer(openai, "merged")
        console.print(f"{ask.QUESTION} → [bold]merged[/]: {answers['merged']!r}")
    if names != ["base", "swift", "harbour"]:
        raise DemoError(f"the Service lists {names}")
    if len({answers[name] for name in names}) != len(names) or not all(answers.values()):
        raise DemoError(f"the answers do not differ: {answers}")
    if answers["merged"] != answers["harbour"]:
        raise DemoError(f"the merged model does not answer as harbour does: {answers}")
    return answers


def farewell(namespace: str) -> None:
    """Five commands to go on with."""
    console.print("\nTry next (after: eval $(make cluster-env)):")
    for line in (
        f"kubectl -n {namespace} get {KINDS.replace('.trimtab.dev', '')}",
        f"kubectl -n {namespace} describe finetunejob harbour",
        "kubectl explain finetunejob.spec.tuner.lora",
        f"kubectl -n {namespace} port-forward service/chat-server 8000:80   # then any OpenAI client",
        "make cluster-down",
    ):
        console.print(f"  {line}")


def main() -> int:
    """Run the demonstration."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--namespace", default="who-are-you", help="namespace to work in (made anew)")
    wanted = arguments.parse_args()
    started = time.monotonic()
    try:
        cluster = connect()
        install.install(cluster, install.images())
        cluster.kubectl("delete", "namespace", wanted.namespace, "--ignore-not-found", "--wait", timeout=180)
        install.namespace(cluster, wanted.namespace)
        install.upload(cluster, EXAMPLE / "data", "data")
        apply(cluster, wanted.namespace)
        watch(cluster, wanted.namespace, 900, everything_ready)
        converse(cluster, wanted.namespace)
    except DemoError as error:
        console.print(f"[red]{error}[/]")
        return 1
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    farewell(wanted.namespace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
