"""A whole export: the model is made whole, quantised, held against itself, published."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import Manifest, MergeConfig
from trimtab_api.v1alpha1.mergejob import Quantize
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_trainer.data.collecting import Needs, sample, standard_rows
from trimtab_trainer.data.masks import render_row
from trimtab_trainer.endings import Fault
from trimtab_trainer.export.likeness import Likeness, compare
from trimtab_trainer.export.quantise import method_of, quantise
from trimtab_trainer.inputs import Pins, fetch_data, fetch_model
from trimtab_trainer.merge.destination import FINGERPRINT, FolderDestination
from trimtab_trainer.merge.job import Outcome, execute, order_of
from trimtab_trainer.merge.writing import Report
from trimtab_trainer.model import tokenizer
from trimtab_trainer.output import Output, open_output, publish
from trimtab_trainer.template import ChatTemplate

SEED = 42
"""Seed of the draw of calibration rows."""
MADE_UP_ROWS, MADE_UP_LENGTH = 4, 128
"""Rows of drawn tokens that a scheme without calibration is checked on."""


@dataclass(frozen=True)
class _Whole:
    """The model before it is quantised, in this pod."""

    folder: Path
    pins: list[PinnedInput]
    made_by: dict[str, Any]


def run(config: MergeConfig, work: Path, report: Report) -> Outcome:
    """Merge if there is something to merge, quantise, check, publish. Raises Fault and the store's errors."""
    wanted = config.spec.quantize
    assert wanted is not None, "asked for by whoever calls"
    output = open_output(config.output)
    for leaving in ("whole", "adapters", "quantised", "calibration"):
        shutil.rmtree(work / leaving, ignore_errors=True)
    whole = _whole(config, work, report)
    if found := method_of(whole.folder):
        raise Fault(
            Reason.MODEL_INVALID,
            f"base {whole.pins[0].uri} is quantised already ({found})",
            "Name the full-precision model.",
        )
    fingerprint = _fingerprint(whole.pins, wanted)
    done = output.find(output.layout.artifact)
    if done is not None and done.made_by.get(FINGERPRINT) == fingerprint:
        return Outcome(output.layout.artifact, done, whole.pins)
    return Outcome(output.layout.artifact, _make(config, wanted, whole, work, output, fingerprint), whole.pins)


def _make(
    config: MergeConfig, wanted: Quantize, whole: _Whole, work: Path, output: Output, fingerprint: str
) -> Manifest:
    loaded = tokenizer.load(whole.folder, "base")
    rows = _rows(config, wanted, loaded, work / "calibration")
    made = work / "quantised"
    quantise(whole.folder, made, wanted, rows, loaded)
    likeness: Likeness | None = None
    if config.spec.verify.enabled:
        likeness = compare(whole.folder, made, rows or _made_up(len(loaded)))
    made_by = {
        **whole.made_by,
        FINGERPRINT: fingerprint,
        "quantization": {
            **wanted.dump(),
            "likeness": None if likeness is None else likeness.document(),
            "versions": _versions(),
        },
    }
    (made / "args.json").write_text(json.dumps(made_by, indent=2, sort_keys=True) + "\n")
    return publish(output, made, output.layout.artifact, made_by)


def _whole(config: MergeConfig, work: Path, report: Report) -> _Whole:
    if config.adapters:
        destination = FolderDestination(work / "whole")
        merged = execute(order_of(config), destination, work / "adapters", report)
        return _Whole(work / "whole", merged.pins, merged.manifest.made_by)
    assert config.base is not None, "a rule asks for base when there is no adapter"
    base = fetch_model(config.base, work / "whole", Pins([]))
    pin = PinnedInput(field=config.base.field, uri=base.reference, digest=base.digest)
    made_by = {"kind": "MergeJob", "job": config.job.dump(), "spec": config.spec.dump(), "base": pin.dump()}
    return _Whole(base.path, [pin], made_by)


def _rows(config: MergeConfig, wanted: Quantize, loaded: Any, into: Path) -> list[list[int]]:
    """Calibration rows as token ids: drawn, rendered as the model is used, cut."""
    if config.calibration is None:
        return []
    own = tokenizer.own_template(loaded)
    special = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    render = None if own is None else ChatTemplate.of(own, None, None, special).renderer()
    local = fetch_data(config.calibration, into, Pins([]))
    found = list(standard_rows(local, Needs(answer=False, text_allowed=True)))
    if not found:
        raise Fault(Reason.DATA_EMPTY, f"{config.calibration.field} {local.display}: no row", "Add rows.")
    if render is None and any("text" not in row for row in found):
        raise Fault(
            Reason.CHAT_TEMPLATE_MISSING,
            f"{config.calibration.field} holds conversations and the model has no chat template",
            "Give rows of plain text.",
        )
    drawn = sample(len(found), min(len(found), wanted.calibration_rows), SEED)
    texts = [render_row(found[index], render, "all")[0] for index in drawn]
    encoded = loaded(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [list(ids[: wanted.max_length]) for ids in encoded if ids]


def _made_up(vocabulary: int) -> list[list[int]]:
    draw = random.Random(SEED)  # noqa: S311 - a draw that must come again
    return [[draw.randrange(vocabulary) for _ in range(MADE_UP_LENGTH)] for _ in range(MADE_UP_ROWS)]


def _fingerprint(pins: Sequence[PinnedInput], wanted: Quantize) -> str:
    what = {"inputs": [pin.dump() for pin in pins], "quantize": wanted.dump(), "versions": _versions()}
    return "sha256:" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
