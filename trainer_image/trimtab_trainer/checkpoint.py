"""Checkpoints: every process uploads what it wrote, the first one writes the manifest last, older ones go afterwards.

A resumed run must be the undisturbed one: each process's random state, its place in the rows, and the loss that was
counted but not yet logged are part of a checkpoint, and one that lacks them is refused.
"""

from __future__ import annotations

import json
import logging
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

log = logging.getLogger(__name__)

FOLDER = "checkpoint-"
"""How transformers begins the name of a checkpoint's folder."""
NOT_KEPT = {"training_args.bin", "README.md"}
"""What transformers writes and a resume does not read; the first is a pickle with this pod's paths in it."""


def random_state_file(rank: int, world: int) -> str:
    """Name under which transformers writes a process's random state."""
    return f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"


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

    def __init__(self, output: Output, group: Group, keep: int, made_by: dict[str, Any]):
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
        report = once(self._group, lambda: self._seal(prefix, step, everyone))
        self.complete.insert(0, report)
        self._group.wait()
        if place.first_of_pod:
            shutil.rmtree(folder)
        if place.first:
            self._rotate()

    def _upload(self, folder: Path, prefix: str) -> list[ManifestFile]:
        place = self._group.place
        own = {random_state_file(place.rank, place.world), window_file(place.rank)}
        others = {
            name
            for rank in range(place.world)
            if rank != place.rank
            for name in (random_state_file(rank, place.world), window_file(rank))
        }
        written = set(files_of(folder)) - NOT_KEPT
        names = written - others if place.first else written & own
        if missing := own - written:
            raise Fault(Reason.CRASHED, f"process {place.rank} wrote no {', '.join(sorted(missing))} into {folder}")
        return self._output.upload(folder, prefix, sorted(names))

    def _seal(self, prefix: str, step: int, everyone: list[list[ManifestFile]]) -> CheckpointReport:
        files = [file for mine in everyone for file in mine]
        see_whole({file.path for file in files}, self._group.place.world, prefix)
        manifest = self._output.seal(prefix, files, {**self._made_by, "step": step})
        log.info("checkpoint of step %d is complete: %s", step, manifest.digest[:19])
        return CheckpointReport(step=step, uri=prefix, digest=manifest.digest)

    def _rotate(self) -> None:
        for old in self.complete[self._keep :]:
            self._output.delete(old.uri)
        del self.complete[self._keep :]


def see_whole(files: set[str], world: int, prefix: str) -> None:
    """Raise Fault(DigestMismatch) when a process's random state is not there: the run would go on a little off."""
    wanted = {name for rank in range(world) for name in (random_state_file(rank, world), window_file(rank))}
    wanted |= {"trainer_state.json", "optimizer.pt", "scheduler.pt"}
    if missing := sorted(wanted - files):
        hint = "Delete that checkpoint's prefix; the run then starts from the one before."
        raise Fault(Reason.DIGEST_MISMATCH, f"{prefix}: {', '.join(missing)} is missing for {world} processes", hint)


def find(output: Output, group: Group, into: Path, rows_digest: str) -> Resume | None:
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
        see_whole({file.path for file in manifest.files}, group.place.world, newest.uri)
        made_from = manifest.made_by.get("sequencesDigest")
        if made_from != rows_digest:
            raise Fault(Reason.INPUT_CHANGED, f"{newest.uri} was made from other rows, or with another tokenizer")
        return output.fetch(newest.uri, into, newest.digest)

    path = once_per_pod(group, fetch)
    state = json.loads((path / "trainer_state.json").read_text())
    log.info("going on from step %d: %s", newest.step, newest.uri)
    return Resume(step=newest.step, path=path, finished=state["global_step"] >= state["max_steps"])
