"""Films: counted frame by frame without decoding them, and read at the frames that a model is shown.

av is imported here and in data.sound alone, when a row shows what it reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEWEST = 2
"""Frames of a film; one frame is an image."""
_MISSING = 0.1
"""Share of a film without a count of its frames that may be missing at its end, where other streams are longer."""


class Unreadable(Exception):
    """What is wrong with a film or a sound."""


@dataclass(frozen=True)
class Film:
    """What is known of a film that was not decoded."""

    height: int
    width: int
    frames: int
    rate: float
    """Frames per second."""


def look(path: Path) -> Film:
    """Count a film's frames and decode the first. Raises Unreadable for a file that is none, or is cut short."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unreadable("has no picture")
            stream = container.streams.video[0]
            promised, rate = stream.frames, stream.average_rate or stream.guessed_rate
            packets = [packet for packet in container.demux(stream) if packet.size]
            whole = None if container.duration is None else container.duration / av.time_base
            counted = len(packets)
            end = max((_end(packet) for packet in packets), default=0.0)
        with av.open(str(path)) as container:
            first = next(container.decode(video=0), None)
    except (av.FFmpegError, OSError) as error:
        raise Unreadable(f"does not open as a video: {error}") from error
    if first is None or not rate:
        raise Unreadable("has no frame")
    if counted < promised:
        raise Unreadable(f"is cut short: {counted} of {promised} frames are there")
    if not promised and whole is not None and end < whole * (1 - _MISSING):
        raise Unreadable(f"is cut short: {end:.1f} of {whole:.1f} seconds are there")
    if counted < FEWEST:
        raise Unreadable("has a single frame; show it as an image")
    return Film(first.height, first.width, counted, float(rate))


def _end(packet: Any) -> float:
    """Seconds at which a packet's frame ends."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def frames(path: Path, wanted: Sequence[int]) -> Any:
    """Frames by their numbers, which rise, as bytes [frames, height, width, 3].

    Raises Unreadable when one cannot be decoded.
    """
    import av
    import numpy
    from av.video.reformatter import VideoReformatter

    found, counts = list[Any](), Counter(wanted)
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            colours = VideoReformatter()
            for number, frame in enumerate(container.decode(video=0)):
                if number not in counts:
                    continue
                found += [colours.reformat(frame, format="rgb24").to_ndarray()] * counts[number]
                if len(found) == len(wanted):
                    return numpy.stack(found)
    except (av.FFmpegError, OSError) as error:
        raise Unreadable(f"breaks off after {len(found)} of {len(wanted)} frames: {error}") from error
    raise Unreadable(f"breaks off after {len(found)} of {len(wanted)} frames")
