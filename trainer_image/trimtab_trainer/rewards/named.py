"""The formulas of rewards by name, each with its source; pure functions of one answer.

They are those of ms-swift and Open-R1 where these have one. accuracy compares texts and numbers, not mathematics: it
does not know that x(x+1) is x^2+x.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(-?\d+)\}")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")


def accuracy(text: str, solution: object) -> float:
    """1 when the answer says what the solution says, else 0.

    Of both the last \\boxed{…} counts, else the last <answer>…</answer>, else everything; of an answer that is not the
    same text, its last number against a solution that is a number.
    """
    wanted, given = _plain(_final(str(solution))), _plain(_final(text))
    if wanted == given:
        return 1.0
    number = _value(wanted)
    if number is None:
        return 0.0
    found = _NUMBER.findall(given)
    return float(bool(found) and _value(found[-1]) == number)


def format_(text: str) -> float:
    """1 for <think>…</think><answer>…</answer> and nothing else (DeepSeek-R1, arXiv:2501.12948), else 0."""
    return float(_FORMAT.fullmatch(text.strip()) is not None)


def soft_overlong(tokens: int, longest: int) -> float:
    """0 up to longest - longest/5 tokens, falling to -1 at the longest (DAPO, arXiv:2503.14476, equation 13)."""
    cache = max(1, longest // 5)
    return min(0.0, max(-1.0, (longest - cache - tokens) / cache))


def repetition(text: str, size: int = 3, largest: float = -1.0) -> float:
    """`largest` times the share of the answer's runs of `size` words that occurred before (arXiv:2502.03373, B.2)."""
    words = text.lower().split()
    if len(words) < size:
        return 0.0
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return (1 - len(set(runs)) / len(runs)) * largest


def cosine(right: bool, tokens: int, longest: int) -> float:
    """Half a cosine over the length (arXiv:2502.03373, C.1): right from 1 down to 0.5, wrong from -0.5 up to 0."""
    short, long = (1.0, 0.5) if right else (-0.5, 0.0)
    way = min(tokens / longest, 1.0)
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * way))


def _final(text: str) -> str:
    """What an answer ends in."""
    boxes = list(_BOXED.finditer(text))
    if boxes:
        return _braced(text, boxes[-1].end())
    answers = _ANSWER.findall(text)
    return answers[-1] if answers else text


def _braced(text: str, start: int) -> str:
    """The text up to the brace that closes one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _plain(text: str) -> str:
    """Without what does not change the meaning: case, spaces, dollar signs, thousands' commas, a full stop."""
    spelt = _FRACTION.sub(r"\1/\2", text).strip().strip("$").strip().rstrip(".").lower()
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", " ".join(spelt.split()))


def _value(text: str) -> Fraction | None:
    if not _NUMBER.fullmatch(text):
        return None
    whole, _, below = text.partition("/")
    return Fraction(whole) / int(below) if below and int(below) else Fraction(whole) if not below else None
