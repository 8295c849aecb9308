"""Keeps the model under the adapters: fetched once in a pod's life, handed to the engine, never exchanged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, ServeConfig
from trimtab_server import handoff
from trimtab_server.agent import backoff, checks
from trimtab_server.agent.desired import Desired
from trimtab_server.agent.failure import Unservable
from trimtab_server.agent.inputs import Inputs, Progress
from trimtab_server.agent.table import Served
from trimtab_server.handoff import Handoff

log = logging.getLogger("trimtab.agent.base")

TELL_SECONDS = 10.0
"""Pause between two words on how far a download is."""


class BaseModel:
    """The base of this pod, from the first desired state that names a model that can be had."""

    def __init__(self, inputs: Inputs, file: Path, on_change: Callable[[], None]) -> None:
        self.served: Served | None = None
        """What the engine is told to serve; None until it is on the disk."""
        self.facts: checks.Base | None = None
        """What adapters must fit."""
        self.failure: Unservable | None = None
        """Why it is not there."""
        self.progress = ""
        """How much of it is here, while it is fetched."""
        self._inputs = inputs
        self._file = file
        self._on_change = on_change

    async def establish(self, desired: Desired) -> None:
        """Fetch the model, however long its source takes to appear, and hand it to the engine."""
        tries = 0
        while self.served is None:
            config = await desired.first()
            try:
                await self._take(config)
            except Unservable as failure:
                tries += 1
                self._fail(failure)
                await desired.changed_within(config, backoff.pause(tries, failure.transient))
                tries = tries if desired.now is config else 0
        self._on_change()

    async def _take(self, config: ServeConfig) -> None:
        source, name = config.model.source, config.model.name
        earlier = handoff.read(self._file)
        if earlier is not None:
            # The agent started again in a pod whose engine runs already: the base stays what it was.
            source, name = _as_it_was(source, earlier), earlier.name
        fetched = await self._inputs.fetch(source, "model", self._teller())
        facts = await asyncio.to_thread(checks.read_base, fetched)
        told = Handoff(name=name, model_path=str(fetched.path), digest=fetched.digest)
        if told != earlier:
            await self._hand_over(told)
        log.info("model %s is at %s", told.served_name, told.model_path)
        self.facts, self.failure = facts, None
        self.served = Served(told.name, told.served_name, told.digest)

    def _teller(self) -> Progress:
        """Notes how far the download is, and says so now and then: each word costs every pod a write."""
        loop, said = asyncio.get_running_loop(), time.monotonic()

        def tell(done: int, whole: int) -> None:
            nonlocal said
            self.progress = f" ({done / 1e9:.1f} of {whole / 1e9:.1f} GB)"
            if time.monotonic() - said >= TELL_SECONDS:
                said = time.monotonic()
                loop.call_soon_threadsafe(self._on_change)

        return tell

    async def _hand_over(self, told: Handoff) -> None:
        try:
            await asyncio.to_thread(handoff.write, told, self._file)
        except OSError as error:
            raise Unservable(
                Reason.DISK_FULL, f"{self._file} cannot be written: {error}; free the node's disk", transient=True
            ) from error

    def _fail(self, failure: Unservable) -> None:
        log.warning("model: %s: %s", failure.reason, failure.message)
        self.failure = failure
        self._on_change()


def _as_it_was(source: ModelInput, earlier: Handoff) -> ModelInput:
    if source.s3 is not None and earlier.digest is not None:
        return source.model_copy(update={"s3": source.s3.model_copy(update={"digest": earlier.digest})})
    if not Path(earlier.model_path).is_dir():
        raise Unservable(
            Reason.MODEL_INVALID, f"model.from: {earlier.model_path}, which the engine serves, is gone; delete the pod"
        )
    return source.model_copy(update={"s3": None, "hugging_face": None, "path": earlier.model_path})
