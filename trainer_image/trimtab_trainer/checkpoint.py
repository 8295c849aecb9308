"""Checkpoints: every process uploads what it wrote, the first one writes the manifest last, older ones go afterwards.

A resumed run must be the undisturbed one: each process's random state, its place in the rows, and the loss that was
counted but not yet logged are part of a checkpoint, and one that lacks them is refused.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trimtab_api.conditions import Reason
from trimtab_api.contract import CheckpointReport, ManifestFile
from trimtab_trainer.distributed import Group, once, once_per_pod
from trimtab_trainer.endings import Fault
from trimtab_trainer.output import Output, files_of
from trimtab_trainer.strategies import Strategy

log = logging.getLogger(__name__)

FOLDER = "checkpoint-"
"""How transformers begins the name of a checkpoint's folder."""
NOT_KEPT = {"training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py"}
"""What libraries write and a resume does not read; the first is a pickle with this pod's paths in it."""
INDEX = ".metadata"
"""Where torch.distributed.checkpoint lists its shards."""
_OWNED = tuple(
    re.compile(pattern)
    for pattern in (
        r"rng_state_(\d+)\.pth",
        r"window_(\d+)\.json",
        r"global_step\d+/(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(?:optim|model)_states\.pt",
        r"(?:pytorch_model_fsdp_0|optimizer_0|layers)/__(\d+)_\d+\.distcp",
    )
)
"""Names of what a process other than the first writes, with its rank."""


def random_state_file(rank: int, world: int) -> str:
    """Name under which transformers writes a process's random state."""
    return f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"


def owner(name: str) -> int:
    """The rank of the process that writes a file of a checkpoint; what all write alike is the first one's."""
    found = next((match for match in (pattern.fullmatch(name) for pattern in _OWNED) if match), None)
    return 0 if found is None else int(found[1])


def window_file(rank: int) -> str:
    """Name of a process's loss that is counted but not yet logged."""
    return f"window_{rank}.json"


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    step: int
    path: Path
    finished: bool
    """Whether it is the run's last step, so that nothing is left but to publish."""


class Keeper(TrainerCallback):
    """Uploads each checkpoint that the trainer writes, and keeps the newest few."""

    def __init__(self, output: Output, group: Group, keep: int, made_by: dict[str, Any], strategy: Strategy):
        self._strategy = strategy
        self._output = output
        self._group = group
        self._keep = keep
        self._made_by = made_by
        self.complete: list[CheckpointReport] = []
        """Newest first."""
        self.trainer: Any = None
        """Set once the trainer exists; its running loss is part of a checkpoint."""
        self.window: Path | None = None
        """The window file to go on from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with the loss that was counted before the checkpoint."""
        if self.window is not None:
            window = json.loads(self.window.read_text())
            self.trainer._tr_loss += window["loss"]
            self.trainer._globalstep_last_logged = window["logged"]
            self.trainer.resume_window(window["counted"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Upload the checkpoint that was just written; the manifest comes last."""
        step = int(state.global_step)
        folder = Path(args.output_dir) / f"{FOLDER}{step}"
        prefix = self._output.layout.checkpoint(step)
        place = self._group.place
        window = {
            "loss": float(self.trainer._tr_loss),
            "logged": self.trainer._globalstep_last_logged,
            "counted": self.trainer.window(),
        }
        (folder / window_file(place.rank)).write_text(json.dumps(window))
        once(self._group, lambda: self._output.retract(prefix))
        mine = self._upload(folder, prefix)
        everyone = self._group.all_of(mine)
        report = once(self._group, lambda: self._seal(folder, prefix, step, everyone))
        self.complete.insert(0, report)
        self._group.wait()
        if place.first_of_pod:
            shutil.rmtree(folder)
        if place.first:
            self._rotate()

    def _upload(self, folder: Path, prefix: str) -> list[ManifestFile]:
        place = self._group.place
        own = {random_state_file(place.rank, place.world), window_file(place.rank)}
        written = set(files_of(folder)) - NOT_KEPT
        names = {name for name in written if owner(name) == place.rank}
        if missing := own - written:
            raise Fault(Reason.CRASHED, f"process {place.rank} wrote no {', '.join(sorted(missing))} into {folder}")
        return self._output.upload(folder, prefix, sorted(names))

    def _seal(self, folder: Path, prefix: str, step: int, everyone: list[list[ManifestFile]]) -> CheckpointReport:
        files = [file for mine in everyone for file in mine]
        wanted = self._strategy.checkpoint_files(step) | _listed(folder)
        see_whole({file.path for file in files}, self._group.place.world, wanted, prefix)
        manifest = self._output.seal(prefix, files, {**self._made_by, "step": step, **self._shape()})
        log.info("checkpoint of step %d is complete: %s", step, manifest.digest[:19])
        return CheckpointReport(step=step, uri=prefix, digest=manifest.digest)

    def _shape(self) -> dict[str, Any]:
        return {"strategy": self._strategy.name, "worldSize": self._group.place.world}

    def _rotate(self) -> None:
        for old in self.complete[self._keep :]:
            self._output.delete(old.uri)
        del self.complete[self._keep :]


def _listed(folder: Path) -> set[str]:
    """The files that the indices of sharded states list."""
    from torch.distributed.checkpoint import FileSystemReader

    return {
        f"{index.parent.name}/{piece.relative_path}"
        for index in folder.glob(f"*/{INDEX}")
        for piece in FileSystemReader(index.parent).read_metadata().storage_data.values()
    }


def see_same_shape(made_by: dict[str, Any], strategy: Strategy, world: int, prefix: str) -> None:
    """Raise Fault(InputChanged) when other processes wrote the checkpoint: its parts are theirs, one by one."""
    wrote = (made_by.get("strategy"), made_by.get("worldSize"))
    if wrote != (strategy.name, world):
        raise Fault(
            Reason.INPUT_CHANGED,
            f"{prefix} was written by {wrote[1]} processes under {wrote[0]}, this run has {world} under "
            f"{strategy.name}",
            "Keep nodes, processesPerNode and strategy of distributed as they were, or start under another name.",
        )


def see_whole(files: set[str], world: int, wanted: set[str], prefix: str) -> None:
    """Raise Fault(DigestMismatch) when a process's random state is not there: the run would go on a little off.

    `wanted`: what the strategy needs besides.
    """
    wanted = {"trainer_state.json", *wanted}
    wanted |= {name for rank in range(world) for name in (random_state_file(rank, world), window_file(rank))}
    if missing := sorted(wanted - files):
        hint = "Delete that checkpoint's prefix; the run then starts from the one before."
        raise Fault(Reason.DIGEST_MISMATCH, f"{prefix}: {', '.join(missing)} is missing for {world} processes", hint)


def find(output: Output, group: Group, into: Path, rows_digest: str, strategy: Strategy) -> Resume | None:
    """The newest complete checkpoint, brought into each pod; None when the run has none. All processes agree on it.

    Raises Fault(InputChanged) when it was made from other rows, Fault(DigestMismatch) when it is not whole.
    """
    newest = once(group, lambda: next(iter(output.checkpoints()), None))
    if newest is None:
        return None

    def fetch() -> Path:
        manifest = output.find(newest.uri)
        if manifest is None:
            raise Fault(Reason.NOT_AN_ARTIFACT, f"{newest.uri}: the checkpoint vanished while it was looked at")
        see_same_shape(manifest.made_by, strategy, group.place.world, newest.uri)
        wanted = strategy.checkpoint_files(newest.step)
        see_whole({file.path for file in manifest.files}, group.place.world, wanted, newest.uri)
        made_from = manifest.made_by.get("sequencesDigest")
        if made_from != rows_digest:
            raise Fault(Reason.INPUT_CHANGED, f"{newest.uri} was made from other rows, or with another tokenizer")
        return output.fetch(newest.uri, into, newest.digest)

    path = once_per_pod(group, fetch)
    state = json.loads((path / "trainer_state.json").read_text())
    log.info("going on from step %d: %s", newest.step, newest.uri)
    return Resume(step=newest.step, path=path, finished=state["global_step"] >= state["max_steps"])
