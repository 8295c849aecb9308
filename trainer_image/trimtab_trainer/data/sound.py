"""Sound: decoded whole, since it is small, to one channel at the rate that a model hears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_trainer.data.film import Unreadable

_ESTIMATED = ("mp3", "aac", "ac3", "eac3", "adts")
"""Containers whose length nobody wrote down."""
_MISSING = 0.1
"""Share that may be missing of the length that a file says it has: encoders pad."""


@dataclass(frozen=True)
class Sound:
    """What is known of a sound."""

    samples: int
    rate: int
    """Samples per second, as it lies there."""

    def at(self, rate: int) -> int:
        """Samples at another rate."""
        return -(-self.samples * rate // self.rate)


def look(path: Path) -> Sound:
    """Decode a sound once. Raises Unreadable for a file that is none, or is cut short."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise Unreadable("has no sound")
            stream = container.streams.audio[0]
            length = None if stream.duration is None or stream.time_base is None else stream.duration * stream.time_base
            written = length if container.format.name not in _ESTIMATED else None
            rate = stream.rate
            samples = sum(frame.samples for frame in container.decode(audio=0))
    except (av.FFmpegError, OSError) as error:
        raise Unreadable(f"does not open as sound: {error}") from error
    if not samples or not rate:
        raise Unreadable("has no sound")
    if _wave_is_cut(path):
        raise Unreadable(f"is cut short: it goes on after {samples / rate:.1f} seconds")
    if written is not None and samples < float(written) * rate * (1 - _MISSING):
        raise Unreadable(f"is cut short: {samples / rate:.1f} of {float(written):.1f} seconds are there")
    return Sound(samples, rate)


def _wave_is_cut(path: Path) -> bool:
    """Whether a .wav file is shorter than it says. Who writes one without knowing its length says 0 or the most."""
    with path.open("rb") as stream:
        head = stream.read(8)
    said = int.from_bytes(head[4:], "little")
    return head[:4] == b"RIFF" and said < 0xFFFFFFFF - 8 and said + 8 > path.stat().st_size


def samples(path: Path, sound: Sound, rate: int) -> Any:
    """The samples at a rate, the mean of all channels, as float32 [samples] between -1 and 1.

    Raises Unreadable when it cannot be decoded.
    """
    import av
    import numpy

    resampler = av.AudioResampler(format="fltp", rate=rate)
    pieces: list[Any] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(audio=0):
                pieces += [each.to_ndarray().mean(axis=0) for each in resampler.resample(frame)]
        pieces += [each.to_ndarray().mean(axis=0) for each in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise Unreadable(f"breaks off: {error}") from error
    whole, wanted = numpy.concatenate(pieces), sound.at(rate)
    # A resampler gives a sample more or less than the arithmetic that lengths in tokens follow from.
    return numpy.pad(whole[:wanted], (0, max(0, wanted - len(whole))))
