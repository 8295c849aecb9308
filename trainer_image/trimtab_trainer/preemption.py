"""SIGTERM, to any one process or all: every process stops after the same step, which is saved."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from trimtab_trainer.distributed import Group
from trimtab_trainer.notice import Notice

log = logging.getLogger(__name__)


class StopTogether(TrainerCallback):
    """After each step the processes agree whether one of them was told to leave; then all save that step and stop."""

    def __init__(self, notice: Notice, group: Group):
        self._notice = notice
        self._group = group
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree, and ask the trainer to save and stop."""
        if self._group.any(self._notice.given):
            log.warning("told to leave: saving step %d and stopping", state.global_step)
            self.stopped = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
