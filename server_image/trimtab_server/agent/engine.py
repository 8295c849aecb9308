"""The only client of the engine's administration, and the watch over its life.

vLLM's error texts change from version to version and are never looked into: whether a load worked is asked of
GET /v1/models. An engine that starts again has lost every adapter; that too is seen there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum

import aiohttp

from trimtab_api.conditions import Reason
from trimtab_server.agent import metrics
from trimtab_server.agent.failure import Unservable

log = logging.getLogger("trimtab.agent.engine")

POLL_SECONDS = 1.0
ANSWER_SECONDS = 5.0
"""Longest wait for an answer to GET /v1/models."""
HUNG_SECONDS = 30.0
"""An engine that takes connections and has not answered for so long hangs."""
LOAD_SECONDS = 120.0
"""Longest wait for a load or an unload."""
QUOTE_LIMIT = 300
"""How much of the engine's own words a message repeats, in characters."""


class Life(Enum):
    """How the engine is."""

    ABSENT = "absent"
    """Nothing listens: not started yet, ended, or loading its model."""
    ANSWERS = "answers"
    """It lists the base of this pod."""
    HUNG = "hung"
    """It takes connections and answers none."""
    STRANGE = "strange"
    """It answers, but does not list the base of this pod."""


class Engine:
    """The engine as it is, seen through its own list of models."""

    def __init__(self, session: aiohttp.ClientSession, url: str, on_change: Callable[[], None]) -> None:
        self.url = url
        self.life = Life.ABSENT
        self.names: frozenset[str] = frozenset()
        """What the engine lists, the base included; empty unless it answers."""
        self.generation = 0
        """Counts the engine's starts that this agent has seen."""
        self.started: datetime | None = None
        """When the present start was first seen to answer."""
        self.max_model_length: int | None = None
        self.base_name: str | None = None
        """The base that it must list to count as ours."""
        self._session = session
        self._on_change = on_change
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asking = asyncio.Lock()
        self._wake = asyncio.Event()
        self._silent_since: float | None = None
        """When the first of the questions began that it has left unanswered since."""

    @property
    def answers(self) -> bool:
        """Whether it serves the base now."""
        return self.life is Life.ANSWERS

    def lock(self, engine_name: str) -> asyncio.Lock:
        """Held while it is decided whether this version is in the engine, and while that is changed."""
        return self._locks[engine_name]

    def poll_soon(self) -> None:
        """Somebody saw a sign that the engine is not as believed."""
        self._wake.set()

    async def watch(self) -> None:
        """Look at the engine every second, and at once when asked, for ever."""
        while True:
            self._wake.clear()
            await self.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def refresh(self) -> None:
        """Ask the engine what it serves and believe that."""
        # One question at a time, or an older answer could be believed after a newer one.
        async with self._asking:
            await self._ask()

    async def _ask(self) -> None:
        began = time.monotonic()
        try:
            names = await self._list()
        except TimeoutError:
            # A busy engine may be slow to answer, and so may this process be to listen: one silence proves nothing.
            self._silent_since = began if self._silent_since is None else self._silent_since
            if began - self._silent_since > HUNG_SECONDS:
                self._believe(Life.HUNG, frozenset())
            return
        except aiohttp.ClientError:
            self._silent_since = None
            self._believe(Life.ABSENT, frozenset())
            return
        except (KeyError, TypeError, ValueError) as error:
            log.warning("GET /v1/models of the engine is not a list of models: %s", error)
            names = frozenset()
        self._silent_since = None
        ours = self.base_name is not None and self.base_name in names
        if ours and not self.answers and not await self._generates(str(self.base_name)):
            return
        self._believe(Life.ANSWERS if ours else Life.STRANGE, names if ours else frozenset())

    async def _generates(self, engine_name: str) -> bool:
        """Whether one token comes out.

        An engine that lists its models may still die of the first request, and one that can serve a model badly
        enough to refuse it is not what is looked for here: only a fault of its own counts.
        """
        body = {"model": engine_name, "prompt": [0], "max_tokens": 1, "temperature": 0}
        status, said = await self._post("/v1/completions", body)
        if 0 < status < 500:
            return True
        log.warning("%s does not answer a request of one token: %s", engine_name, said[:QUOTE_LIMIT])
        return False

    async def load(self, engine_name: str, path: str) -> None:
        """Load an adapter and see that it is there.

        Raises Unservable when it is not there afterwards, whatever the engine said.
        """
        with metrics.LOADS.time():
            _, said = await self._post("/v1/load_lora_adapter", {"lora_name": engine_name, "lora_path": path})
        await self.refresh()
        if engine_name in self.names:
            if await self._generates(engine_name):
                return
            said = "it took the adapter and fails at its first token"
            await self.unload(engine_name)
        if not self.answers:
            raise Unservable(Reason.LOADING, "the engine went away while it loaded the adapter", transient=True)
        raise Unservable(
            Reason.ADAPTER_UNSUPPORTED,
            f"the engine refused the adapter ({said[:QUOTE_LIMIT]}); "
            "fold it into its base with a MergeJob and serve the result",
            transient=True,
        )

    async def unload(self, engine_name: str) -> bool:
        """Unload an adapter; whether it is gone."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": engine_name})
        await self.refresh()
        return engine_name not in self.names

    async def metrics(self) -> bytes:
        """The engine's own metrics in the text format; empty while it does not answer."""
        try:
            async with self._session.get(
                f"{self.url}/metrics",
                headers={"Accept": "text/plain;version=0.0.4"},
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            ) as answer:
                return await answer.read() if answer.status == 200 else b""
        except (aiohttp.ClientError, TimeoutError):
            return b""

    async def _list(self) -> frozenset[str]:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with self._session.get(f"{self.url}/v1/models", timeout=timeout) as answer:
            answer.raise_for_status()
            listed = (await answer.json())["data"]
        for each in listed:
            if each.get("max_model_len"):
                self.max_model_length = int(each["max_model_len"])
        return frozenset(each["id"] for each in listed)

    async def _post(self, path: str, body: Mapping[str, object]) -> tuple[int, str]:
        """Status and text of the answer; status 0 when there was none."""
        timeout = aiohttp.ClientTimeout(total=LOAD_SECONDS)
        try:
            async with self._session.post(f"{self.url}{path}", json=body, timeout=timeout) as answer:
                return answer.status, f"HTTP {answer.status}: {(await answer.text()).strip()}"
        except TimeoutError:
            return 0, f"no answer within {LOAD_SECONDS:.0f} s"
        except aiohttp.ClientError as error:
            return 0, f"{type(error).__name__}: {error}"

    def _believe(self, life: Life, names: frozenset[str]) -> None:
        if life is Life.ANSWERS and self.life is not Life.ANSWERS:
            self.generation += 1
            self.started = datetime.now(UTC)
            log.info("the engine answers; it lists %s", ", ".join(sorted(names)))
        elif life is not self.life:
            log.warning("the engine is %s", life.value)
        if (life, names) != (self.life, self.names):
            self.life, self.names = life, names
            self._on_change()
