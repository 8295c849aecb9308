"""Short films for tests, of one colour first and of another in the end; and tones."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.unit.trainer.conftest import conversation, lines
from tests.unit.trainer.images.conftest import COLOURS, SIDE, others

FRAMES = 4
RATE = 2
ASKED = "<video>which colour comes last?"


def film(first: str, last: str, shade: int = 0, frames: int = FRAMES) -> bytes:
    """An mp4 of two seconds."""
    import av
    import numpy

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video: Any = container.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(frames):
            shown = [value + shade for value in COLOURS[first if number < frames / 2 else last]]
            picture = numpy.full((SIDE, SIDE, 3), shown).clip(0, 255).astype(numpy.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def uri(content: bytes, kind: str = "video/mp4") -> str:
    """The same as a data: URI."""
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def filmed(first: str, last: str, answer: str | None = None, shade: int = 0) -> dict[str, Any]:
    """A question about a film, with an answer or without."""
    said = [] if answer is None else [answer]
    return {**conversation(ASKED, *said), "videos": [uri(film(first, last, shade))]}


def films(shades: Iterable[int], answered: bool = True, **columns: str) -> list[dict[str, Any]]:
    """Films of all pairs of colours, with columns that are the last colour."""
    return [
        {
            **filmed(first, last, last if answered else None, shade),
            **{key: value.format(last) for key, value in columns.items()},
        }
        for shade in shades
        for last in COLOURS
        for first in others(last)
    ]


def file_of(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Rows in a file, with the film or the sound of each as a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for number, row in enumerate(rows):
        column, suffix = ("videos", "mp4") if "videos" in row else ("audios", "wav")
        [written] = row[column]
        name = kept(folder, f"{number}.{suffix}", base64.b64decode(written.split(",", 1)[1]))
        told.append({**row, column: [name]})
    path = folder / "rows.jsonl"
    path.write_text(lines(told))
    return path


def tone(seconds: float, hertz: float = 440, rate: int = 16000) -> bytes:
    """A .wav file."""
    import wave

    import numpy

    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        phases = numpy.arange(int(seconds * rate)) * 2 * numpy.pi * hertz / rate
        file.writeframes((numpy.sin(phases) * 20000).astype("<i2").tobytes())
    return stream.getvalue()


def kept(folder: Path, name: str, content: bytes) -> str:
    """A file; returns its name."""
    (folder / name).write_bytes(content)
    return name
