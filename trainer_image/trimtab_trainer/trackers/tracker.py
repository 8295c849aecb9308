"""What all trackers have in common, and the little that a run is to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from trimtab_api.contract import RunConfig

Keys = Mapping[str, str]
"""Credentials by their documented names."""


class Tracker(Protocol):
    """One run in one tracker. Its methods may wait for a network, and raise whatever its library raises."""

    @property
    def place(self) -> str:
        """What to call it in a sentence."""
        ...

    def begin(self) -> None:
        """Make the run, or go on in the one that an earlier attempt made."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell numbers of a step."""
        ...

    def end(self, whole: bool) -> None:
        """Say that no more will come from this attempt. `whole`: all steps are done."""
        ...


def parameters(config: RunConfig) -> dict[str, str]:
    """The spec and what was left to Trimtab as flat names and texts: training.learningRate → 0.0002.

    Rows given inline are left out.
    """
    document = {**config.spec.dump(), "resolved": config.resolved.dump()}
    return dict(_flat("", document))


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            pair
            for key, inner in value.items()
            if key != "inline"
            for pair in _flat(f"{name}.{key}".lstrip("."), inner)
        ]
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return [pair for number, inner in enumerate(value) for pair in _flat(f"{name}.{number}", inner)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]
