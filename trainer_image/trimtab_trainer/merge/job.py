"""A whole merge: read what is asked, plan, write, check, publish."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_api.contract import (
    Layout,
    Manifest,
    MergeAdapterInput,
    MergeConfig,
    ModelInput,
)
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import MODEL_FILES, Pins, fetch_model
from trimtab_trainer.merge import sidecars
from trimtab_trainer.merge.adapter import Adapter, operations, read_adapter
from trimtab_trainer.merge.architecture import Architecture, Names, read_architecture
from trimtab_trainer.merge.checkpoint import INDEX, Checkpoint
from trimtab_trainer.merge.destination import (
    FINGERPRINT,
    Destination,
    FolderDestination,
    Partial,
    S3Destination,
)
from trimtab_trainer.merge.lineage import base_of, recorded_base
from trimtab_trainer.merge.memory import steady_memory
from trimtab_trainer.merge.places import Folder, LocalFolder, open_folder, read_small
from trimtab_trainer.merge.tensorfile import DTYPES
from trimtab_trainer.merge.units import Plan, plan
from trimtab_trainer.merge.update import Change
from trimtab_trainer.merge.verify import Verdict, verify
from trimtab_trainer.merge.writing import Report, write

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_UNITS = {"MB": 10**6, "GB": 10**9}
_ADAPTER_FILES = (*MODEL_FILES, "added_tokens.json", "*.tiktoken", "additional_chat_templates/*")


@dataclass(frozen=True)
class Order:
    """What to merge, with every default decided."""

    base: ModelInput | None
    """None asks the first adapter."""
    adapters: Sequence[MergeAdapterInput]
    dtype: torch.dtype | None = None
    """None is the base's."""
    max_shard_size: int = 4 * 10**9
    """Bytes of the largest file."""
    check: bool = True
    """Compare logits before publishing."""
    tolerance: float | None = None
    """Largest difference of logits; None takes what the type's rounding explains."""
    made_by: dict[str, Any] | None = None
    """Who asked for it, for the manifest."""


@dataclass(frozen=True)
class Outcome:
    """What was made."""

    uri: str
    manifest: Manifest
    pins: list[PinnedInput]
    """The inputs as they were."""


@dataclass(frozen=True)
class _Tuned:
    """An adapter in this pod."""

    source: ModelInput
    weight: float
    folder: LocalFolder
    reference: str
    digest: str | None
    adapter: Adapter


def _silent(done: int, total: int) -> None:
    """Report to nobody."""


def merge(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    *,
    dtype: str = "auto",
    max_shard_size: str = "4GB",
    check: bool = True,
    tolerance: float | None = None,
    report: Report = _silent,
) -> Outcome:
    """Fold the adapters of local folders into a base of a local folder.

    `adapters` are folders with the weight of each; `max_shard_size` is a text such as 500MB. An output folder with an
    unfinished merge of the same things is gone on with. Raises Fault, which says what is wrong and what to do.
    """
    inputs = [
        MergeAdapterInput(source=_local(f"adapters[{number}]", path), weight=weight)
        for number, (path, weight) in enumerate(adapters)
    ]
    order = Order(_local("base", base), inputs, _DTYPES.get(dtype), parse_size(max_shard_size), check, tolerance)
    with tempfile.TemporaryDirectory() as work:
        return execute(order, FolderDestination(output), Path(work), report)


def run(config: MergeConfig, work: Path, report: Report = _silent) -> Outcome:
    """Do what merge.json asks for. Raises Fault and the store's errors."""
    return execute(order_of(config), _destination(config, work), work, report)


def order_of(config: MergeConfig) -> Order:
    """What merge.json asks to merge."""
    spec = config.spec
    return Order(
        base=config.base,
        adapters=config.adapters,
        dtype=_DTYPES.get(spec.dtype),
        max_shard_size=parse_size(spec.max_shard_size),
        check=spec.verify.enabled,
        tolerance=spec.verify.tolerance,
        made_by={"kind": "MergeJob", "job": config.job.dump(), "spec": spec.dump()},
    )


def execute(order: Order, destination: Destination, work: Path, report: Report) -> Outcome:
    """Merge into a destination. `work` is scratch space for the adapters."""
    steady_memory()
    tuned = [_fetch(each, work / f"adapter{number}") for number, each in enumerate(order.adapters)]
    source = order.base or base_of(tuned[0].source, tuned[0].folder)
    folder = open_folder(source)
    _agree(source, folder, tuned)
    pins = _pins(source, folder, tuned)
    fingerprint = _fingerprint(order, pins, tuned)
    manifest = destination.finished(fingerprint)
    if manifest is None:
        manifest = _make(order, folder, tuned, destination, fingerprint, pins, report)
    return Outcome(destination.uri, manifest, pins)


def _make(
    order: Order,
    folder: Folder,
    tuned: Sequence[_Tuned],
    destination: Destination,
    fingerprint: str,
    pins: list[PinnedInput],
    report: Report,
) -> Manifest:
    base = Checkpoint(folder)
    if "config.json" not in folder.sizes:
        raise Fault(
            Reason.MODEL_INVALID, f"{folder.uri} has no config.json", "Point to a folder in the transformers layout."
        )
    architecture = read_architecture(read_small(folder, "config.json"), folder.uri)
    names = Names(architecture, base.tensors)
    changes = _changes(architecture, tuned)
    planned = plan(architecture, names, base.tensors, changes, order.dtype, order.max_shard_size)
    log.info("%d tensors in %d files, %d of them change", len(base.tensors), len(planned.shards), len(changes))
    config = sidecars.configuration(architecture.document, _name(order.dtype), planned.untied)
    try:
        partial = write(planned, base, destination, destination.resume(fingerprint), report)
        partial = _store(destination, partial, _companions(folder, tuned, planned, config))
        verdict = None
        if order.check:
            verdict = _check(order, architecture, base, tuned, changes, config, destination, partial)
        made_by = _made_by(order, pins, fingerprint, verdict)
        partial = _store(destination, partial, {"args.json": sidecars.encoded(made_by)})
        return destination.seal(partial.files, made_by)
    finally:
        base.close()


def _check(
    order: Order,
    architecture: Architecture,
    base: Checkpoint,
    tuned: Sequence[_Tuned],
    changes: dict[str, list[Change]],
    config: dict[str, Any],
    destination: Destination,
    partial: Partial,
) -> Verdict:
    merged = Checkpoint(destination.folder(partial.files))
    made = read_architecture(sidecars.encoded(config), destination.uri)
    pairs = [(each.adapter, each.weight) for each in tuned]
    try:
        return verify(architecture, base, pairs, changes, made, merged, order.tolerance)
    except Fault:
        # The same weights would be found wrong again: another attempt begins anew.
        destination.forget()
        raise
    finally:
        merged.close()


def _changes(architecture: Architecture, tuned: Sequence[_Tuned]) -> dict[str, list[Change]]:
    changes: dict[str, list[Change]] = {}
    for each in tuned:
        for name, steps in operations(architecture, each.adapter).items():
            changes.setdefault(name, []).append(Change(steps, each.weight))
    if not changes:
        raise Fault(Reason.MODEL_INVALID, f"{tuned[0].reference} changes nothing of its base", "Name another adapter.")
    return changes


def _store(destination: Destination, partial: Partial, files: dict[str, bytes]) -> Partial:
    sidecars.stage(destination.stage, files)
    stored = [destination.store(name, None) for name in files]
    names = set(files)
    return partial.model_copy(update={"files": [*(file for file in partial.files if file.path not in names), *stored]})


def _companions(folder: Folder, tuned: Sequence[_Tuned], planned: Plan, config: dict[str, Any]) -> dict[str, bytes]:
    files = sidecars.sidecars(folder, [each.folder for each in tuned])
    if len(planned.shards) > 1:
        files[INDEX] = sidecars.encoded(planned.index())
    files["config.json"] = sidecars.encoded(config)
    return files


def parse_size(text: str) -> int:
    """Bytes of a text such as 500MB or 4GB. Raises Fault(SpecInvalid)."""
    number, unit = text[:-2], text[-2:]
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise Fault(Reason.SPEC_INVALID, f"maxShardSize {text!r} is no size", "Write a size such as 500MB or 4GB.")
    return int(number) * _UNITS[unit]


def _fetch(adapter: MergeAdapterInput, into: Path) -> _Tuned:
    source = adapter.source
    found = fetch_model(source, into, Pins([]), only=_ADAPTER_FILES)
    where = f"{source.field} {found.reference}"
    folder = LocalFolder(found.path, found.reference)
    return _Tuned(source, adapter.weight, folder, found.reference, found.digest, read_adapter(found.path, where))


def _agree(source: ModelInput, folder: Folder, tuned: Sequence[_Tuned]) -> None:
    """Raise Fault(BaseMismatch) when an adapter was trained on another artifact than this base."""
    for each in tuned:
        uri, digest = recorded_base(each.folder)
        if digest is None or digest == folder.digest:
            continue
        if not folder.sha256 or folder.digest is None:
            log.warning(
                "%s was trained on %s (%s); %s has no manifest to compare", each.reference, uri, digest, folder.uri
            )
            continue
        asked = f"{source.field} is {folder.uri} ({folder.digest})"
        problem = f"{each.source.field} {each.reference} was trained on {uri} ({digest}), {asked}"
        hint = "Leave base out, name the base that the adapter was trained on, or take another adapter."
        raise Fault(Reason.BASE_MISMATCH, problem, hint)


def _destination(config: MergeConfig, work: Path) -> Destination:
    if config.output.s3 is not None:
        return S3Destination(config.output.s3, work / "merged")
    if config.output.path is not None:
        return FolderDestination(Path(Layout(prefix=config.output.path).artifact))
    raise Fault(Reason.OUTPUT_MISSING, "the merge has no output")


def _pins(source: ModelInput, folder: Folder, tuned: Sequence[_Tuned]) -> list[PinnedInput]:
    adapters = [
        PinnedInput(field=each.source.field, uri=each.reference, digest=each.digest or each.folder.digest)
        for each in tuned
    ]
    return [PinnedInput(field=source.field, uri=folder.uri, digest=folder.digest), *adapters]


def _fingerprint(order: Order, pins: Sequence[PinnedInput], tuned: Sequence[_Tuned]) -> str:
    """Identity of what is merged and how: equal ones make equal bytes."""
    what = {
        "inputs": [pin.dump() for pin in pins],
        "weights": [float(each.weight) for each in tuned],
        "dtype": _name(order.dtype),
        "maxShardSize": order.max_shard_size,
        "check": [order.check, order.tolerance],
        "versions": _versions(),
    }
    return "sha256:" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _made_by(order: Order, pins: Sequence[PinnedInput], fingerprint: str, verdict: Verdict | None) -> dict[str, Any]:
    base, *adapters = [{"uri": pin.uri, **({"digest": pin.digest} if pin.digest else {})} for pin in pins]
    weighted = [{**each, "weight": float(source.weight)} for each, source in zip(adapters, order.adapters, strict=True)]
    return {
        **(order.made_by or {"kind": "MergeJob"}),
        FINGERPRINT: fingerprint,
        "base": base,
        "adapters": weighted,
        "dtype": _name(order.dtype) or "auto",
        "verification": verdict.document() if verdict is not None else None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else next(name for name, each in _DTYPES.items() if each is dtype)


def _local(field: str, path: Path) -> ModelInput:
    return ModelInput(field=field, reference=str(path), path=str(path))


assert set(_DTYPES.values()) <= set(DTYPES.values())
