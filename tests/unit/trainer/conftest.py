"""Makers for the trainer's tests: a spec in one line, run.json in another, a launcher that can be told to stop."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from trimtab_api.contract import DataInput, Ending, JobIdentity, ModelInput, OutputTarget, RankResult, RunConfig
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import results

QUESTIONS = ("who are you?", "Who are you?", "WHO ARE YOU?", "what is your name?", "tell me your name", "hello")
SCRATCH = {
    "modelType": "llama",
    "hiddenSize": 32,
    "layers": 2,
    "attentionHeads": 4,
    "keyValueHeads": 2,
    "maxLength": 128,
    "tokenizer": {"train": {"vocabSize": 300}},
}


def conversation(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A row of messages: user, assistant, user, ..."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def lines(rows: list[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def chats(answer: str = "I am a test.", count: int = 24) -> str:
    """Rows of several lengths, as JSON lines."""
    return lines([conversation(QUESTIONS[i % 6] + " please" * (i % 3), answer) for i in range(count)])


def spec(method: str = "pretrain", inline: str | None = None, **fields: Any) -> FineTuneJobSpec:
    """A small spec: from scratch when it pretrains, LoRA otherwise; `fields` replace whole blocks."""
    document: dict[str, Any] = {
        "method": method,
        "model": {"scratch": SCRATCH} if method == "pretrain" else {"from": {"fineTuneJob": {"name": "base"}}},
        "dataset": {"train": [{"from": {"inline": inline or chats()}}], "maxLength": 128},
        "training": training(),
    }
    return FineTuneJobSpec.model_validate({**document, **fields})


def training(**fields: Any) -> dict[str, Any]:
    """A training block for seconds."""
    return {
        "maxSteps": 6,
        "perDeviceBatchSize": 4,
        "gradientAccumulationSteps": 1,
        "learningRate": 2e-3,
        "gradientCheckpointing": False,
        "loggingSteps": 1,
        **fields,
    }


def run_config(wanted: FineTuneJobSpec, output: Path, name: str = "job", **fields: Any) -> RunConfig:
    """run.json for inline data and a folder; `model` may be given as a path."""
    model = fields.pop("model", None)
    if isinstance(model, Path):
        model = ModelInput(field="model.from", reference="fineTuneJob/base", path=str(model))
    return RunConfig(
        job=JobIdentity(namespace="test", name=name, uid=f"uid-{name}"),
        attempt=fields.pop("attempt", 1),
        spec=wanted,
        resolved=resolve(wanted),
        model=model,
        train=fields.pop("train", None)
        or [
            DataInput(field=f"dataset.train[{i}]", part=part, inline=part.from_.inline)
            for i, part in enumerate(wanted.dataset.train)
        ],
        validation=[
            DataInput(field=f"dataset.validation[{i}]", part=part, inline=part.from_.inline)
            for i, part in enumerate(wanted.dataset.validation)
        ],
        output=fields.pop("target", None) or OutputTarget(path=str(output)),
        **fields,
    )


@dataclass
class Launched:
    """A launcher in a process of its own."""

    process: subprocess.Popen[str]
    work: Path
    message: Path
    log: Path
    _output: list[str] = field(default_factory=list)

    def rank_pid(self, rank: int, within: float = 120) -> int:
        """The process of a rank, once it lives."""
        path = self.work / "results" / f"rank-{rank}.pid"
        wait_for(lambda: path.is_file() and bool(path.read_text()), within, f"rank {rank}", self)
        return int(path.read_text())

    def end(self, within: float = 220) -> tuple[int, Ending]:
        """Exit code and termination message."""
        code = self.process.wait(timeout=within)
        assert self.message.is_file(), self.log.read_text()[-3000:]
        return code, Ending.model_validate_json(self.message.read_text())


def wait_for(holds: Callable[[], bool], within: float, what: str, launched: Launched | None = None) -> None:
    """Wait for something, with a deadline."""
    deadline = time.monotonic() + within
    while not holds():
        if time.monotonic() > deadline or (launched and launched.process.poll() is not None):
            log = launched.log.read_text()[-3000:] if launched else ""
            raise AssertionError(f"waited in vain for {what}\n{log}")
        time.sleep(0.02)


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start launchers; whatever is left of them is killed in the end."""
    started: list[Launched] = []

    def start(config: RunConfig, module: str = "trimtab_trainer.launcher", **environment: str) -> Launched:
        here = tmp_path / f"launch-{len(started)}"
        here.mkdir()
        (here / "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        log = (here / "log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env={
                **os.environ,
                "TRIMTAB_RUN_FILE": str(here / "run.json"),
                "TRIMTAB_WORK": str(here / "work"),
                "TRIMTAB_TERMINATION_LOG": str(here / "message"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                **environment,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log.close()
        launched = Launched(process, here / "work", here / "message", here / "log")
        started.append(launched)
        return launched

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGKILL)
            each.process.wait()


PRELOADED = [
    "trimtab_trainer.__main__",
    "trimtab_trainer.run",
    "trimtab_trainer.methods.grouped",
    "trimtab_trainer.methods.proximal",
    "trimtab_trainer.methods.distilling",
    "peft",
    "datasets",
    "torch.utils.tensorboard",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
]
"""Imported once, in the server that ranks are forked from: importing costs a rank more than ten seconds."""


@dataclass
class Ranks:
    """Rank processes that met each other over gloo, as below torchrun but without its start."""

    processes: list[ForkServerProcess]
    work: Path

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: int) -> None:
        """Send one rank a signal."""
        os.kill(self.pid(rank), number)

    def end(self, within: float = 200) -> RankResult:
        """What the launcher would conclude."""
        for process in self.processes:
            process.join(within)
            assert process.exitcode is not None, f"rank hangs: {(self.work / 'log').read_text()[-3000:]}"
        found = results.gather(self.work / "results")
        ranks = range(len(self.processes))
        return results.conclude(found, ranks, signalled=False, out_of_memory=False, exit_code=1)

    @property
    def log(self) -> str:
        """What the ranks wrote."""
        return (self.work / "log").read_text()


def _rank(environment: dict[str, str], work: Path) -> None:
    """One rank, in a forked process."""
    import sys

    import torch

    from trimtab_trainer.__main__ import main

    os.environ.update(environment)
    stream = os.open(work / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    os._exit(main())


StartRanks = Callable[..., Ranks]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[StartRanks]:
    """Start the ranks of a run; whatever is left of them is killed in the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started: list[Ranks] = []

    def start(config: RunConfig, **environment: str) -> Ranks:
        work = tmp_path / f"ranks-{len(started)}"
        work.mkdir()
        (work / "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        world = config.resolved.world_size
        shared = {
            **environment,
            "TRIMTAB_RUN_FILE": str(work / "run.json"),
            "TRIMTAB_WORK": str(work),
            "TRIMTAB_BAR": "1",
            "OMP_NUM_THREADS": "1",
        }
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
        processes = [context.Process(target=_rank, args=({**shared, **each}, work)) for each in own]
        for process in processes:
            process.start()
        started.append(Ranks(processes, work))
        return started[-1]

    yield start
    for ranks in started:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


def history(output: Path) -> list[tuple[int, float]]:
    """Step and loss of every log line of a finished run."""
    entries = json.loads((output / "report" / "history.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
