"""The HTTP of the engine beside the trainer: is it there, this adapter, one answer. Every wait has its limit.

vLLM's error texts change from version to version: they are quoted to the user and never looked into.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import ENGINE_PORT, ROLLOUT_CONTAINER, ROLLOUT_END, ROLLOUT_READ, RolloutEnd
from trimtab_trainer.endings import Fault

POLL_SECONDS = 0.3
LOOK_SECONDS = 10.0
"""Longest wait for a word on the engine's health."""
LOAD_SECONDS = 300.0
"""Longest wait for an adapter to be loaded."""
ANSWER_SECONDS = 1800.0
"""Longest wait for one answer; all of a round are asked for at once and wait for each other."""
QUOTED = 400
"""So much of what the engine says is told, in characters."""


@dataclass(frozen=True)
class Answer:
    """What the engine drew."""

    tokens: list[int]
    log_probs: list[float]
    """Of each token, in the distribution that it was drawn from."""


class Wire:
    """The engine in this pod. `root`: the folder that it shares with the trainer."""

    def __init__(self, root: Path, port: int = ENGINE_PORT):
        self._root = root
        self._port = port

    def await_ready(self, seconds: float) -> None:
        """Wait until the engine answers. Raises Fault(EngineFailed) when it ended, or when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                status, _ = self._send("GET", "/health", None, LOOK_SECONDS)
                if status == http.HTTPStatus.OK:
                    return
            except (OSError, http.client.HTTPException):
                # It does not listen yet; whether it ever will is known by its end or by the clock.
                pass
            if ended := self._end():
                raise _failed(f"the engine ended with code {ended.exit_code} before it was ready")
            if time.monotonic() > deadline:
                raise _failed(f"the engine was not ready within {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def load(self, name: str, folder: Path) -> None:
        """Let the engine take an adapter in. Raises Fault(EngineFailed) when it does not."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, LOAD_SECONDS)

    def unload(self, name: str) -> None:
        """Let the engine forget an adapter. Raises Fault(EngineFailed) when it does not."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name}, LOAD_SECONDS)

    def reload(self, folder: Path) -> None:
        """Let the engine read all weights anew, and drop what it kept. Raises Fault(EngineFailed) when it does not."""
        asked = {"method": ROLLOUT_READ, "kwargs": {"folder": str(folder)}}
        self._post("/collective_rpc", asked, LOAD_SECONDS)
        said = self._post("/reset_prefix_cache", {}, LOAD_SECONDS)
        if "true" not in said:
            raise _failed(f"the engine did not drop what it kept of earlier weights: {said[:QUOTED]}")

    def ask(self, request: dict[str, Any]) -> Answer:
        """One completion of one prompt of token ids. Raises Fault(EngineFailed) when there is none."""
        said = self._post("/v1/completions", request, ANSWER_SECONDS)
        try:
            found = json.loads(said)["choices"][0]
            answer = Answer(found["token_ids"], found["logprobs"]["token_logprobs"])
        except (ValueError, LookupError, TypeError) as error:
            raise _failed(f"the engine answered what is no completion: {said[:QUOTED]!r}") from error
        if not answer.tokens or len(answer.tokens) != len(answer.log_probs):
            raise _failed(f"the engine answered {len(answer.tokens)} tokens and {len(answer.log_probs)} probabilities")
        return answer

    def _post(self, path: str, body: dict[str, Any], seconds: float) -> str:
        try:
            status, said = self._send("POST", path, json.dumps(body), seconds)
        except (OSError, http.client.HTTPException) as error:
            ended = self._end()
            how = f"ended with code {ended.exit_code}" if ended else f"does not answer: {type(error).__name__}: {error}"
            raise _failed(f"the engine {how}") from error
        if status != http.HTTPStatus.OK:
            raise _failed(f"the engine answered {path} with {status}: {said[:QUOTED]}")
        return said

    def _send(self, method: str, path: str, body: str | None, seconds: float) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=seconds)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def _end(self) -> RolloutEnd | None:
        file = self._root / ROLLOUT_END
        return RolloutEnd.read(json.loads(file.read_text())) if file.exists() else None


def _failed(message: str) -> Fault:
    return Fault(Reason.ENGINE_FAILED, message, f"Read the log of the container {ROLLOUT_CONTAINER} of the pod.")
