"""Takes the evidence finalizer off every pod that still carries it, once there is no operator left to do so.

The chart runs it after everything else of a release is gone; `python -m trimtab_operator.uninstall` does the same by
hand. Without it those pods could never be deleted, nor the namespaces that hold them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from trimtab_api import names
from trimtab_operator.kube import Kube, KubeError
from trimtab_operator.plan import Object

ROUNDS = 5
"""Looks at the cluster: a pod that changed meanwhile is met again in the next one."""
PAUSE_SECONDS = 2.0


async def held(kube: Kube, namespaces: Sequence[str]) -> list[Object]:
    """The pods that carry the finalizer, in these namespaces or, with none given, everywhere."""
    places: Sequence[str | None] = namespaces or [None]
    pods = [pod for namespace in places for pod in await kube.list("Pod", namespace, names.CHILDREN)]
    return [pod for pod in pods if names.EVIDENCE_FINALIZER in (pod["metadata"].get("finalizers") or [])]


async def strip(kube: Kube, namespaces: Sequence[str], pause: float = PAUSE_SECONDS) -> int:
    """Take the finalizer off all of them and return how many there were.

    Raises KubeError, naming the pods that are left, when it did not come off within ROUNDS looks.
    """
    freed, failures = 0, dict[str, str]()
    for number in range(ROUNDS):
        pods = await held(kube, namespaces)
        if not pods:
            return freed
        if number and failures:
            await asyncio.sleep(pause)
        failures = {}
        for pod in pods:
            try:
                await kube.release(pod)
                freed += 1
            except KubeError as error:
                failures[f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"] = str(error)
    if left := await held(kube, namespaces):
        raise KubeError(
            f"{len(left)} pods still carry the finalizer {names.EVIDENCE_FINALIZER}: "
            + "; ".join(f"{pod}: {why}" for pod, why in list(failures.items())[:10])
        )
    return freed


async def run(namespaces: Sequence[str]) -> int:
    """Connect, strip, and say what was done. Returns the exit status."""
    kube = await Kube.connect()
    try:
        freed = await strip(kube, namespaces)
    except KubeError as error:
        sys.stderr.write(
            f"{error}\nRun `python -m trimtab_operator.uninstall` again, or take it off by hand with "
            '`kubectl patch pod NAME --type=json -p \'[{"op": "remove", "path": "/metadata/finalizers"}]\'`\n'
        )
        return 1
    finally:
        await kube.close()
    sys.stdout.write(f"{freed} pods are free to go\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command behind the chart's hook."""
    parser = argparse.ArgumentParser(
        prog="uninstall", description="Take Trimtab's finalizer off the pods that are left."
    )
    parser.add_argument("--namespace", action="append", default=[], help="look here alone; may be given several times")
    return asyncio.run(run(parser.parse_args(arguments).namespace))


if __name__ == "__main__":
    sys.exit(main())
