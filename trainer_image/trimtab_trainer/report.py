"""The course of a run for people: a picture of the loss, and TensorBoard events, beside the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SERIES = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
}


def write(history: list[dict[str, Any]], title: str, folder: Path) -> None:
    """Write loss.png, history.json and a TensorBoard event file for the trainer's log history."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    _picture(history, title, folder / "loss.png")
    _events(history, folder)


def _picture(history: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=title)
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else "")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _events(history: list[dict[str, Any]], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for entry in history:
            for name, tag in _SERIES.items():
                if name in entry:
                    writer.add_scalar(tag, entry[name], entry["step"])
