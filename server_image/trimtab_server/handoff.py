"""What the agent tells the engine: one small file in the volume that both containers mount.

It is written once in a pod's life. An engine that starts again therefore serves the same base, whatever the desired
ConfigMap says by then: another base is another pod.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import Field, ValidationError

from trimtab_api.contract import WORK_ROOT
from trimtab_api.schema import Model
from trimtab_api.v1alpha1.source import Digest

HANDOFF_FILE = f"{WORK_ROOT}/engine/handoff.json"
"""Where the agent leaves it; the engine's container mounts the volume read-only."""

LOCAL = "local"
"""Stands for the digest of what has none, such as a folder on a volume without a manifest."""


class Handoff(Model):
    """The base that this pod serves."""

    name: str = Field(min_length=1)
    """What clients call it."""
    model_path: str = Field(min_length=1)
    """Folder of the model, the same in both containers."""
    digest: Digest | None = None
    """Identity of the model; None when it has no manifest."""

    @property
    def served_name(self) -> str:
        """What the engine calls it."""
        return versioned(self.name, self.digest)


def versioned(name: str, digest: str | None) -> str:
    """The engine's name for one version: NAME@DIGEST12. Two versions of one name live side by side under it."""
    return f"{name}@{digest.removeprefix('sha256:')[:12] if digest else LOCAL}"


def write(handoff: Handoff, file: Path) -> None:
    """Put the file in place, whole or not at all, and readable by the engine. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(handoff.dump()), encoding="utf-8")
    draft.chmod(0o644)
    draft.replace(file)


def read(file: Path) -> Handoff | None:
    """The handoff, or None while there is none. Raises ValueError when the file is not one."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Handoff.read(json.loads(text))
    except (ValidationError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: is no handoff of the agent: {error}; delete the pod to start afresh") from error
