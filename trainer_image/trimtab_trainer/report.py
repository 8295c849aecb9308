"""The course of a run for people: one page, a picture of the loss, and TensorBoard events, beside the artifact."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
"""One line of a trainer's history: step, epoch, and the numbers that were logged then."""
Points = list[tuple[int, float]]

_NOT_SERIES = ("step", "epoch", "total_flos", "train_runtime", "train_loss")
_NOT_SERIES_ENDS = ("_runtime", "_per_second")
_EVAL = "eval_"


@dataclass(frozen=True)
class About:
    """What the page tells beside the curves."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    """Short lines: rows, tokens, memory, speed."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """The resolved spec."""


def write(history: Sequence[Entry], about: About, folder: Path) -> None:
    """Write index.html, loss.png, history.json and a TensorBoard event file for the trainer's log history."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.json").write_text(json.dumps(list(history), indent=1) + "\n")
    (folder / "loss.png").write_bytes(_drawn(_figure("loss", series(history), about.title), "png"))
    (folder / "index.html").write_text(page(history, about))
    _events(history, folder)


def series(history: Sequence[Entry]) -> dict[str, Points]:
    """Every finite number that was logged, by name, with its step; names of timings are left out."""
    found: dict[str, Points] = {}
    for entry in history:
        for name, value in metrics(entry).items():
            found.setdefault(name, []).append((int(entry["step"]), value))
    return found


def metrics(logged: Entry) -> dict[str, float]:
    """The finite numbers of one log line that say how well it goes."""
    return {
        name: float(value)
        for name, value in logged.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and name not in _NOT_SERIES
        and not name.endswith(_NOT_SERIES_ENDS)
    }


def page(history: Sequence[Entry], about: About) -> str:
    """One page that needs nothing beside it."""
    known = series(history)
    facts = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in about.facts.items())
    last = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{points[0][1]:.4g}</td><td>{points[-1][1]:.4g}</td></tr>"
        for name, points in sorted(known.items())
    )
    curves = "".join(f"<figure>{_svg(name, known)}</figure>" for name in _names(known))
    spec = html.escape(json.dumps(about.spec, indent=2, sort_keys=True, ensure_ascii=False))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(about.title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(about.title)}</h1><table>{facts}</table>"
        f"<section>{curves}</section><h2>First and last</h2><table>{last}</table>"
        f"<details><summary>The spec, as it ran</summary><pre>{spec}</pre></details></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem}section{display:grid;grid-template-columns:"
    "repeat(auto-fit,minmax(28rem,1fr));gap:1rem}figure{margin:0}svg{width:100%;height:auto}"
    "th{text-align:left;font-weight:500;padding:.1rem 1rem .1rem 0}td{padding-right:1rem}"
    "pre{overflow:auto;background:#f5f6f8;padding:1rem}"
)


def _names(known: Mapping[str, Points]) -> Iterator[str]:
    """A curve for each quantity, that of the validation rows in the same picture; the loss comes first."""
    plain = sorted({name.removeprefix(_EVAL) for name in known}, key=lambda name: (name != "loss", name))
    yield from plain


def _figure(name: str, known: Mapping[str, Points], title: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    # Fixed margins: to measure the texts, a layout engine draws everything once more.
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.12, top=0.92)
    axes = figure.add_subplot(xlabel="step", ylabel=name, title=title)
    for key, label in ((name, "training"), (_EVAL + name, "validation")):
        if points := known.get(key):
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else "")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def _svg(name: str, known: Mapping[str, Points]) -> str:
    drawn = _drawn(_figure(name, known, name), "svg").decode()
    return drawn[drawn.index("<svg") :]


def _drawn(figure: Any, kind: str) -> bytes:
    import matplotlib

    into = io.BytesIO()
    # Names of a page's parts follow from what is drawn, not from chance.
    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none"}):
        figure.savefig(into, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return into.getvalue()


def _events(history: Sequence[Entry], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, points in series(history).items():
            tag = f"eval/{name.removeprefix(_EVAL)}" if name.startswith(_EVAL) else f"train/{name}"
            for step, value in points:
                writer.add_scalar(tag, value, step)
