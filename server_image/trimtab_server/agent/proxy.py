"""What clients reach: the user routes of the engine, by stable names, streamed as they come.

Everything that is not named here is not there: the engine's administration, and whatever its next version adds.
A client that goes away takes its request to the engine with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from trimtab_server.agent import answers, metrics
from trimtab_server.agent.rewriting import Body, BodyInvalid, Renamer, read_body
from trimtab_server.agent.state import State
from trimtab_server.agent.table import Served

log = logging.getLogger("trimtab.agent.proxy")

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
"""POST routes that are passed on."""

BODY_LIMIT = 32 << 20
"""Largest request, in bytes: room for a few images in base64."""
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 3600.0
"""Longest silence of the engine within one answer; long answers that are not streamed are one silence."""
IDLE_SECONDS = 30.0
"""How long an idle connection to the engine is kept; the engine keeps it longer, so it never closes one in use."""

VERSION_HEADER = "X-Trimtab-Model"
"""Tells the exact version that answered."""

NOT_FORWARDED = frozenset(
    {
        "host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade",
        "proxy-authorization", "proxy-authenticate", "proxy-connection", "authorization", "cookie", "expect",
        "accept-encoding", "content-encoding",
    }
)  # fmt: skip
NOT_RETURNED = frozenset(
    {"content-length", "transfer-encoding", "connection", "keep-alive", "server", "date", "content-encoding", "trailer"}
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """The agent answers this request itself."""

    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Proxy:
    """The user-facing HTTP application."""

    def __init__(self, state: State, session: aiohttp.ClientSession) -> None:
        self._state = state
        self._session = session

    def application(self) -> web.Application:
        """The routes; probes stand beside them, so that they test the very listener that clients use."""
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[plain_errors])
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_get("/v1/models/{name}", self.show_model)
        app.router.add_get("/healthz/live", self.live)
        app.router.add_get("/healthz/ready", self.ready)
        app.router.add_get("/healthz/engine", self.engine)
        for route in ROUTES:
            app.router.add_post(route, self.forward)
        return app

    async def live(self, _: web.Request) -> web.Response:
        """Whether the agent itself runs: that it answers is the answer."""
        return web.Response(text="ok\n")

    async def ready(self, _: web.Request) -> web.Response:
        """Whether clients shall be sent here, and why not."""
        reason, message = self._state.explain()
        return web.Response(status=200 if self._state.ready else 503, text=f"{reason}: {message}\n")

    async def engine(self, _: web.Request) -> web.Response:
        """Whether the engine hangs; one that is absent or starting is the kubelet's affair."""
        life = self._state.engine.life
        return web.Response(status=503 if life is life.HUNG else 200, text=f"{life.value}\n")

    async def list_models(self, _: web.Request) -> web.Response:
        """The base, then the adapters in the order of the spec, as far as they answer now."""
        if not self._state.serving:
            return self._not_ready()
        return web.json_response({"object": "list", "data": [self._card(each) for each in self._served()]})

    async def show_model(self, request: web.Request) -> web.Response:
        """One of them."""
        try:
            return web.json_response(self._card(self._choose(request.match_info["name"])))
        except Refused as refused:
            return refused.answer

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on to the engine and its answer back."""
        began = time.monotonic()
        name = ""
        try:
            body = read_body(await request.read())
            served = self._choose(body.model)
            name = served.name
            with self._state.table.use(served):
                answer = await self._relay(request, body, served, began)
        except BodyInvalid as error:
            answer = answers.error(400, str(error), "invalid_body")
        except Refused as refused:
            answer = refused.answer
        metrics.REQUESTS.labels(name, answer.status).inc()
        return answer

    def _choose(self, name: str | None) -> Served:
        """The version that shall answer. Raises Refused."""
        if not self._state.serving:
            raise Refused(self._not_ready())
        base = self._state.base.served
        assert base is not None
        served = base if name in (None, base.name, base.engine_name) else self._state.table.resolve(name or "")
        if served is not None and served.engine_name in self._state.engine.names:
            return served
        keeper = self._state.adapters.find(name or "")
        if keeper is None:
            known = ", ".join(each.name for each in self._served())
            message = f"The model `{name}` does not exist; served here: {known}."
            raise Refused(answers.error(404, message, "model_not_found", "model"))
        told = keeper.report()
        message = f"The adapter `{name}` is not served yet: {told.reason}" + (f": {told.message}" * bool(told.message))
        raise Refused(answers.error(503, message, "not_ready", "model"))

    async def _relay(self, request: web.Request, body: Body, served: Served, began: float) -> web.StreamResponse:
        answer: web.StreamResponse | None = None
        try:
            async with self._session.post(
                f"{self._state.engine.url}{request.path}",
                data=body.naming(served.engine_name),
                headers=_forwarded(request),
            ) as upstream:
                if upstream.status == 404 and await self._has_lost(served):
                    return self._engine_lost()
                metrics.FIRST_BYTE.observe(time.monotonic() - began)
                answer = self._begin(upstream, served)
                await answer.prepare(request)
                await _copy(upstream, answer, served)
        except TimeoutError:
            return await self._broken(request, answer, 504)
        except aiohttp.ClientError:
            return await self._broken(request, answer, 503)
        return answer

    def _begin(self, upstream: aiohttp.ClientResponse, served: Served) -> web.StreamResponse:
        answer = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for key, value in upstream.headers.items():
            if key.lower() not in NOT_RETURNED:
                answer.headers.add(key, value)
        answer.headers[VERSION_HEADER] = served.engine_name
        if self._state.draining:
            # A kept connection would bring its next request here, past the endpoints.
            answer.force_close()
        return answer

    async def _has_lost(self, served: Served) -> bool:
        """Whether a 404 means that the engine was started anew, rather than that it lacks the route."""
        await self._state.engine.refresh()
        return served.engine_name not in self._state.engine.names

    async def _broken(self, request: web.Request, answer: web.StreamResponse | None, status: int) -> web.StreamResponse:
        """The engine went away: say so, in the stream if there is one already, and never as a proper end."""
        self._state.engine.poll_soon()
        if answer is None:
            return self._engine_lost(status)
        if answer.content_type == "text/event-stream":
            await answer.write(answers.event("The engine went away in the middle of the answer.", "engine_lost"))
        if request.transport is not None:
            request.transport.close()
        return answer

    def _engine_lost(self, status: int = 503) -> web.Response:
        self._state.engine.poll_soon()
        return answers.error(status, "The engine went away; it is being started again.", "engine_lost")

    def _not_ready(self) -> web.Response:
        reason, message = self._state.explain()
        return answers.error(503, f"Nothing is served yet: {reason}: {message}", "not_ready")

    def _served(self) -> list[Served]:
        base = self._state.base.served
        order = [base] if base is not None else []
        order += [found for each in self._state.adapters.reports() if (found := self._state.table.resolve(each.name))]
        return [each for each in order if each.engine_name in self._state.engine.names]

    def _card(self, served: Served) -> dict[str, object]:
        base = self._state.base.served
        started = self._state.engine.started
        return {
            "id": served.name,
            "object": "model",
            "created": int(started.timestamp()) if started else 0,
            "owned_by": "trimtab",
            "root": served.engine_name,
            "parent": base.name if base is not None and served is not base else None,
            "max_model_len": self._state.engine.max_model_length,
            "digest": served.digest,
        }


async def _copy(upstream: aiohttp.ClientResponse, answer: web.StreamResponse, served: Served) -> None:
    renamer = Renamer(served.engine_name, served.name)
    async for chunk in upstream.content.iter_any():
        if ready := renamer.feed(chunk):
            await answer.write(ready)
    if rest := renamer.end():
        await answer.write(rest)
    await answer.write_eof()


def _forwarded(request: web.Request) -> list[tuple[str, str]]:
    return [(key, value) for key, value in request.headers.items() if key.lower() not in NOT_FORWARDED]


def engine_session() -> aiohttp.ClientSession:
    """The connections to the engine that carry clients' requests: as many as there are requests."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give aiohttp's own refusals (404, 405, 413) the form that OpenAI's clients understand."""
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        return answers.error(413, f"The request is larger than {BODY_LIMIT} bytes.", "too_large")
    except web.HTTPException as error:
        return answers.error(error.status, f"{request.method} {request.path}: {error.reason}", "not_found")
