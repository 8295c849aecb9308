"""What an adapter was trained on: told by its files, reached through its own connection. Without torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import ModelInput, S3Place
from trimtab_api.v1alpha1.source import HubModel
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import ADAPTER_CONFIG, LocalModel, Pins, fetch_model
from trimtab_trainer.merge.places import Folder, LocalFolder


def fetch_with_base(source: ModelInput, into: Path, pins: Pins) -> LocalModel:
    """Bring a model into this pod; of an adapter, what it was trained on as well, as LocalModel.base.

    Raises what fetch_model raises, and Fault(ModelInvalid) for an adapter whose base cannot be read from here.
    """
    local = fetch_model(source, into, pins)
    if not (local.path / ADAPTER_CONFIG).is_file():
        return local
    base = base_of(source, LocalFolder(local.path, local.reference))
    return replace(local, base=fetch_model(base, into.with_name(f"{into.name}-base"), pins))


def base_of(adapter: ModelInput, folder: Folder) -> ModelInput:
    """The base that an adapter was trained on, reached through the adapter's own connection.

    Raises Fault(ModelInvalid) when the adapter does not say, or says something that cannot be read from here.
    """
    uri, digest = recorded_base(folder)
    where = f"the base of {adapter.field}"
    if uri is not None and uri.startswith("s3://") and adapter.s3 is not None:
        place = S3Place(uri=uri, connection=adapter.s3.connection, digest=digest)
        return ModelInput(field=where, reference=uri, s3=place)
    if uri is not None and uri.startswith("hf://"):
        repo, _, revision = uri.removeprefix("hf://").partition("@")
        return ModelInput(field=where, reference=uri, hugging_face=HubModel(repo=repo, revision=revision or "main"))
    if uri is not None and Path(uri).is_dir():
        return ModelInput(field=where, reference=uri, path=uri)
    problem = f"{adapter.field} {adapter.reference} names no base that can be read from here ({uri or 'none'})"
    raise Fault(Reason.MODEL_INVALID, problem, "Set base.")


def recorded_base(folder: Folder) -> tuple[str | None, str | None]:
    """Reference and digest of the base as manifest, args.json or adapter_config.json tell it, the first that does."""
    for name, path in (("manifest.json", ("madeBy", "base")), ("args.json", ("base",)), ("args.json", ("model",))):
        found: Any = _document(folder, name)
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and (found.get("uri") or found.get("reference")):
            return str(found.get("uri") or found.get("reference")), found.get("digest")
    return _document(folder, ADAPTER_CONFIG).get("base_model_name_or_path"), None


def _document(folder: Folder, name: str) -> dict[str, Any]:
    if name not in folder.sizes:
        return {}
    content = bytearray(folder.sizes[name])
    folder.read_into(name, 0, memoryview(content))
    found = json.loads(bytes(content))
    return found if isinstance(found, dict) else {}
