"""The errors that the agent itself gives to clients, in the form that OpenAI's clients understand."""

from __future__ import annotations

import json

from aiohttp import web

RETRY_SECONDS = 5
"""What a client is told to wait while something is on its way."""


def error(status: int, message: str, code: str, param: str | None = None) -> web.Response:
    """An error as JSON; 503 tells when to come back."""
    answer = web.Response(
        status=status, text=json.dumps(content(message, code, param)), content_type="application/json"
    )
    if status == 503:
        answer.headers["Retry-After"] = str(RETRY_SECONDS)
    return answer


def content(message: str, code: str, param: str | None = None) -> dict[str, object]:
    """The body of an error."""
    kind = "service_unavailable" if code in ("not_ready", "engine_lost") else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(message: str, code: str) -> bytes:
    """An error within a stream of events, after whatever was cut off before it."""
    return f"\n\ndata: {json.dumps(content(message, code))}\n\n".encode()
