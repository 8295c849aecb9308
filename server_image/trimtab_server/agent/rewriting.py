"""Exchanges the model's name: stable to exact in what clients send, exact to stable in what they get.

Both ways work on the bytes and leave everything else as it is. A request is scanned member by member at its top level
and the one string is spliced; it is never written anew, so that no number, order or escape changes. An answer is
searched for `"model":"<exact name>"`. Within a JSON string every quote stands behind a backslash, so these bytes cannot
be part of a generated text; and a name with a digest is long and plain enough to need no escapes itself. Only a chunk
whose end could be the beginning of that text is held back, by that much: vLLM's chunks end with an event, so in
practice none is. The cost is one search in C for each chunk; why it is paid: clients find in the answer the name that
they asked for, as with every other server of this interface, and the exact version in a header beside it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class BodyInvalid(Exception):
    """The request's body is not what it must be; the text says why, to the client."""


@dataclass(frozen=True)
class Body:
    """A JSON object and where the value of its member `model` stands."""

    text: str
    model: str | None
    """The name asked for; None when there is no such member."""
    start: int = 0
    end: int = 0

    def naming(self, engine_name: str) -> bytes:
        """The same bytes with another model."""
        if self.model is None:
            return self.text.encode()
        return (self.text[: self.start] + json.dumps(engine_name) + self.text[self.end :]).encode()


def read_body(raw: bytes) -> Body:
    """Find the model in a request. Raises BodyInvalid."""
    try:
        text = raw.decode()
        return _scan(text)
    except UnicodeDecodeError as error:
        raise BodyInvalid(f"the body is not UTF-8: {error}") from error
    except RecursionError as error:
        raise BodyInvalid("the body is nested too deeply") from error
    except ValueError as error:
        raise BodyInvalid(f"the body is not JSON: {error}") from error


def _scan(text: str) -> Body:
    found = Body(text, None)
    position = _after(text, 0, "{")
    if text.startswith("}", position):
        return found
    while True:
        key, position = _DECODER.raw_decode(text, position)
        if not isinstance(key, str):
            raise BodyInvalid("the body is not a JSON object")
        start = _after(text, position, ":")
        value, end = _DECODER.raw_decode(text, start)
        if key == "model":
            found = _only(found, Body(text, value, start, end))
        position = _skip(text, end)
        if text.startswith("}", position):
            return _ended(found, text, position + 1)
        position = _after(text, position, ",")


def _only(earlier: Body, found: Body) -> Body:
    if earlier.model is not None:
        raise BodyInvalid("the body gives model twice; give it once")
    if not isinstance(found.model, str):
        raise BodyInvalid("model must be a string, the name of a served model")
    return found


def _ended(found: Body, text: str, position: int) -> Body:
    if _skip(text, position) != len(text):
        raise BodyInvalid("something follows the JSON object")
    return found


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _after(text: str, position: int, sign: str) -> int:
    position = _skip(text, position)
    if not text.startswith(sign, position):
        raise BodyInvalid(f"the body is not a JSON object: {sign!r} expected at character {position}")
    return _skip(text, position + 1)


class Renamer:
    """Turns the exact name back into the stable one in the chunks of one answer."""

    def __init__(self, engine_name: str, name: str) -> None:
        exact, stable = json.dumps(engine_name).encode(), json.dumps(name).encode()
        # vLLM writes no space after the colon; some of its routes may.
        self._pairs = [(b'"model":' + space + exact, b'"model":' + space + stable) for space in (b"", b" ")]
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What of the answer can be sent on."""
        data = self._held + chunk
        for exact, stable in self._pairs:
            data = data.replace(exact, stable)
        keep = 0 if data.endswith((b"\n", b"}")) else max(_overlap(data, exact) for exact, _ in self._pairs)
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def end(self) -> bytes:
        """What was held back when the answer ended."""
        held, self._held = self._held, b""
        return held


def _overlap(data: bytes, pattern: bytes) -> int:
    """Length of the longest end of data that is a beginning of the pattern, but not all of it."""
    return next((size for size in range(min(len(pattern) - 1, len(data)), 0, -1) if data.endswith(pattern[:size])), 0)
