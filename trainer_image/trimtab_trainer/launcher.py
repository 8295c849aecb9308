"""The container's first process: starts torchrun, passes SIGTERM on, and says in one message and one code how it ended.

python -m trimtab_trainer.launcher
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trimtab_api.conditions import Reason
from trimtab_api.contract import Exit, RankResult, RunConfig
from trimtab_trainer import results, workplace
from trimtab_trainer.endings import Fault, ending_of
from trimtab_trainer.inputs import uses_hub

log = logging.getLogger(__name__)

DEFAULT_GRACE_SECONDS = 300
"""Patience with ranks after SIGTERM when the pod does not say its own."""
LINGER_SECONDS = 30.0
"""Patience with torchrun once all its ranks have ended."""
POLL_SECONDS = 1.0
"""How often the ranks' results are looked for."""
SPARE_SECONDS = 10
"""Kept back from the pod's grace period to write the message."""


@dataclass(frozen=True)
class Gang:
    """This pod's place among the pods, as training-operator injects it."""

    nodes: int
    processes: int
    node_rank: int
    address: str
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str], config: RunConfig) -> Gang:
        """Read the environment and hold it against the spec.

        Raises Fault(SpecInvalid) when the world is not the one that was asked for.
        """
        resolved = config.resolved
        nodes = int(environment.get("PET_NNODES", "1"))
        world = nodes * resolved.processes_per_node
        if nodes != config.spec.distributed.nodes or world != resolved.world_size:
            raise Fault(
                Reason.SPEC_INVALID,
                f"the pods make a world of {world} processes ({nodes} pods × {resolved.processes_per_node}), "
                f"the spec asks for {resolved.world_size} on {config.spec.distributed.nodes}",
                "Let Trimtab make the PyTorchJob, or give every pod the same run.json.",
            )
        announced = int(environment.get("WORLD_SIZE", world))
        if announced not in (nodes, world):
            raise Fault(
                Reason.SPEC_INVALID,
                f"WORLD_SIZE is {announced}, the spec asks for {world} processes on {nodes} pods",
                "Let Trimtab make the PyTorchJob.",
            )
        return cls(
            nodes=nodes,
            processes=resolved.processes_per_node,
            node_rank=int(environment.get("PET_NODE_RANK", "0")),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", "29500")),
        )

    @property
    def ranks(self) -> range:
        """The global ranks of this pod."""
        first = self.node_rank * self.processes
        return range(first, first + self.processes)

    def command(self) -> list[str]:
        """torchrun for this pod. A lone pod chooses a free port, so that two may share a network.

        A lone process has nobody to meet: it is started without torchrun, whose import alone takes seconds.
        """
        if self.nodes * self.processes == 1:
            return [sys.executable, "-m", "trimtab_trainer"]
        meeting = (
            ["--standalone"]
            if self.nodes == 1
            else [
                f"--nnodes={self.nodes}",
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.address}",
                f"--master-port={self.port}",
            ]
        )
        return [
            sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={self.processes}",
            "--max-restarts=0", "-m", "trimtab_trainer",
        ]  # fmt: skip


class Ranks:
    """The ranks of this pod, below torchrun, in a process group of their own."""

    def __init__(self, gang: Gang, environment: dict[str, str], folder: Path):
        self.signalled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._gang = gang
        self._environment = environment
        self._folder = folder

    def pass_on(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: the ranks shall save a common step and leave.

        torchrun itself is left alone: told to stop, it leaves without the other pods' torchruns, which then wait five
        minutes for it. Only when no rank lives yet is there nothing but torchrun to tell.
        """
        self.signalled = True
        told = [results.signal_rank(self._folder, rank, signal.SIGTERM) for rank in self._gang.ranks]
        if not any(told) and self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Run to the end; whatever is left of the group is killed then. Returns the child's exit code."""
        self._process = subprocess.Popen(self._gang.command(), env=self._environment, start_new_session=True)
        if self.signalled:
            # The signal came before there was a child to tell.
            self._process.send_signal(signal.SIGTERM)
        code = self._wait(self._process)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            log.debug("nothing is left of the group")
        return code

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the child, but not much longer than its ranks: torchrun may wait for pods that are gone."""
        patience = LINGER_SECONDS
        while True:
            try:
                return process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if len(results.gather(self._folder)) == len(self._gang.ranks):
                    patience -= POLL_SECONDS
            if patience <= 0:
                log.warning("all ranks have ended and torchrun has not: ending it")
                return 0


def environment_for(gang: Gang, inherited: Mapping[str, str]) -> dict[str, str]:
    """torchrun's environment: threads by the CPU limit, patience below the pod's grace period, PET_* left out."""
    grace = int(inherited.get(workplace.GRACE_SECONDS, DEFAULT_GRACE_SECONDS))
    kept = {name: value for name, value in inherited.items() if not name.startswith("PET_")}
    return {
        **kept,
        # Pods without a CPU limit share cores: threads that spin while they wait would take them from each other.
        "OMP_WAIT_POLICY": inherited.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", str(workplace.threads(gang.processes))),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, grace - SPARE_SECONDS)),
        "PYTHONUNBUFFERED": "1",
    }


def oom_kills(events: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    """How often the kernel has killed a process of this container for memory."""
    if not events.is_file():
        return 0
    counts = dict(line.split() for line in events.read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def launch(config: RunConfig, gang: Gang, environment: Mapping[str, str]) -> RankResult:
    """Run the ranks of this pod and conclude from what they left. SIGTERM and SIGINT ask them to save and leave."""
    workplace.prepare(workplace.work_root(), hub=uses_hub(config))
    folder = workplace.results_folder()
    ranks = Ranks(gang, environment_for(gang, {**environment, **workplace.settings()}), folder)
    results.clear(folder)
    signal.signal(signal.SIGTERM, ranks.pass_on)
    signal.signal(signal.SIGINT, ranks.pass_on)
    kills = oom_kills()
    log.info("starting ranks %s of %s", list(gang.ranks), config.resolved.world_size)
    code = ranks.run()
    return results.conclude(
        results.gather(folder),
        gang.ranks,
        signalled=ranks.signalled,
        out_of_memory=oom_kills() > kills,
        exit_code=code,
    )


def main() -> int:
    """Launch, write the termination message, return the table's code."""
    workplace.log_to_stderr()
    try:
        config = RunConfig.model_validate_json(workplace.run_file().read_text())
        result = launch(config, Gang.of(os.environ, config), os.environ)
    except Exception as error:  # noqa: BLE001 - the last door: whatever it is, the message must be written
        code, ending = ending_of(error)
        result = RankResult(rank=0, exit=code, ending=ending)
    workplace.termination_log().write_text(result.ending.text())
    level = logging.INFO if result.exit is Exit.OK else logging.ERROR
    log.log(level, "%s (%d): %s %s", result.ending.reason, result.exit, result.ending.message, result.ending.hint)
    return int(result.exit)


if __name__ == "__main__":
    sys.exit(main())
