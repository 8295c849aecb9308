"""Tokenised rows, kept in storage under a name that follows from all that they are made of.

One process tokenises, whatever the number of pods; a later attempt, or another job on the same rows, fetches what was
kept. What is kept is never trusted by its name alone: it is held against its manifest, and made anew when it is broken.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api.contract import Layout, RunConfig
from trimtab_store import StorageError
from trimtab_trainer.distributed import Group, once, once_per_pod
from trimtab_trainer.endings import Fault
from trimtab_trainer.output import Output, publish

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train.arrow", "validation.arrow"
WORTH_KEEPING = 1 << 20
"""Bytes of tokenised rows below which tokenising again is as quick as fetching."""
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_ELSEWHERE = {
    "training", "checkpoint", "evaluation", "distributed", "tuner", "reports", "output", "storage", "pod", "suspend",
    "retries", "activeDeadlineSeconds", "hangTimeoutSeconds", "ttlSecondsAfterFinished",
}  # fmt: skip
"""Parts of a spec that no token depends on."""
_IN_ROWS = {"train", "validation", "cache", "workers"}
"""Parts of the data set that are in its rows already, or change nothing of them."""

Make = Callable[[Path], str]
"""Writes TRAIN, and VALIDATION where there are such rows, into a folder that is there; returns what identifies them."""


@dataclass(frozen=True)
class Ingredients:
    """All that tokenised rows are made of."""

    rows: str
    """Identity of the rows, with what they show."""
    tokenizer: Path
    """Its folder: tokenizer and processor files."""
    template: str | None
    """Source of the chat template."""
    software: Mapping[str, str]
    """Versions of what turns rows into tokens: another may do it in another way."""

    def key(self, config: RunConfig) -> str:
        """The name of what is made of them, 32 hexadecimal digits."""
        spec = {name: value for name, value in config.spec.dump().items() if name not in _ELSEWHERE}
        dataset = {name: value for name, value in spec["dataset"].items() if name not in _IN_ROWS}
        spec |= {"dataset": dataset, "model": config.spec.model.new_tokens}
        files = sorted(path for path in self.tokenizer.iterdir() if path.suffix in TOKENIZER_SUFFIXES)
        made_of = {
            "rows": self.rows,
            "template": self.template,
            "spec": spec,
            "resolved": [config.resolved.loss, config.resolved.truncation],
            "tokenizer": {path.name: _digest(path) for path in files if not path.name.endswith(".index.json")},
            "software": {"image": config.resolved.image, **self.software},
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def place(layout: Layout, config: RunConfig, key: str) -> str:
    """The prefix of what is kept: below the job's own, or beside all jobs of its namespace."""
    shared = config.spec.dataset.cache == "namespace" and config.output.s3 is not None
    return layout.sequences(key, shared)


def obtain(
    group: Group, output: Output, prefix: str, make: Make, into: Path, made_by: dict[str, Any]
) -> tuple[Path, str]:
    """The folder with TRAIN and VALIDATION, and what identifies them: fetched if they are kept, else made, and kept.

    Raises what `make` raises.
    """
    found = once(group, lambda: output.find(prefix))
    if found is not None:
        digest = str(found.made_by["sequences"])
        return once_per_pod(group, lambda: _fetched(output, prefix, into, found.digest, digest, make)), digest
    digest, worth = once(group, lambda: _made(output, prefix, into, make, made_by))

    def as_well() -> tuple[Path, str]:
        if group.place.first:
            return into, digest
        if worth:
            return output.fetch(prefix, into / "fetched"), digest
        return anew(into, make)

    return once_per_pod(group, as_well)


def _made(output: Output, prefix: str, into: Path, make: Make, made_by: dict[str, Any]) -> tuple[str, bool]:
    _, digest = anew(into, make)
    worth = sum(path.stat().st_size for path in into.iterdir()) >= WORTH_KEEPING
    if worth:
        publish(output, into, prefix, {**made_by, "sequences": digest})
        log.info("kept the tokenised rows: %s", prefix)
    return digest, worth


def _fetched(output: Output, prefix: str, into: Path, manifest: str, digest: str, make: Make) -> Path:
    try:
        folder = output.fetch(prefix, into, manifest)
        log.info("took the tokenised rows that were kept: %s", prefix)
    except (StorageError, Fault) as error:
        log.warning("what is kept at %s cannot be used, the rows are tokenised again: %s", prefix, error)
        folder, again = anew(into, make)
        if again != digest:
            # Another pod may have taken what was kept: the two must not learn from different rows.
            raise
    return folder


def anew(into: Path, make: Make) -> tuple[Path, str]:
    """What is made in a folder, and what identifies it."""
    into.mkdir(parents=True, exist_ok=True)
    return into, make(into)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
