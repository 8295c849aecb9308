"""Refuses, before the engine is asked, what the engine could not serve: by name, with the remedy.

The engine checks some of this itself, but late, in words that change, and for part of it not at all: an adapter of
another base with the same shapes is loaded gladly and answers nonsense. Left to the engine is only what it alone can
know, such as which modules its implementation of an architecture can adapt.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.modeldeployment import LoraRank
from trimtab_server.agent.failure import Unservable
from trimtab_server.agent.inputs import Fetched
from trimtab_server.agent.tensors import Tensor, read_folder, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"

PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false"})
"""Values of init_lora_weights after which the base is what it was; others (PiSSA, OLoRA, ...) changed it."""

MERGE = "fold it into its base with a MergeJob and serve the result"


@dataclass(frozen=True)
class Base:
    """What an adapter must fit."""

    digest: str | None
    tensors: Mapping[str, Tensor]
    """Tensors of the model; empty when their shapes say nothing, as in a quantised model."""


def read_base(fetched: Fetched) -> Base:
    """The base's facts. Raises Unservable when the folder is no model."""
    config = fetched.path / "config.json"
    try:
        quantised = "quantization_config" in json.loads(config.read_bytes())
        tensors = read_folder(fetched.path)
        missing = _missing_shards(fetched.path)
    except FileNotFoundError as error:
        raise Unservable(
            Reason.MODEL_INVALID, "model.from: the folder has no config.json; point to a model in transformers' layout"
        ) from error
    except ValueError as error:
        raise Unservable(Reason.MODEL_INVALID, f"model.from: {error}; publish the model again") from error
    if not tensors:
        raise Unservable(
            Reason.MODEL_INVALID, "model.from: the folder holds no *.safetensors; point to the folder of the weights"
        )
    if missing:
        raise Unservable(
            Reason.MODEL_INVALID, f"model.from: {INDEX} names {missing[0]}, which is not there; publish the model again"
        )
    return Base(fetched.digest, {} if quantised else tensors)


def _missing_shards(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return []
    named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
    return sorted(name for name in named if not (folder / name).is_file())


def check_adapter(name: str, fetched: Fetched, base: Base, max_lora_rank: int) -> None:
    """See that the engine can serve this adapter on this base. Raises Unservable with the first thing amiss."""
    where = f"adapters[{name}]"
    config = _read_config(where, fetched.path)
    tensors = _read_weights(where, fetched.path)
    _check_features(where, config)
    _check_origin(where, fetched.made_by, base.digest)
    ranks = _check_names(where, tensors)
    _check_rank(where, config, ranks, max_lora_rank)
    _check_shapes(where, config, tensors, base.tensors)


def _read_config(where: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError as error:
        raise Unservable(
            Reason.MODEL_INVALID, f"{where}: has no {CONFIG}: it is no PEFT adapter; point to the folder of one"
        ) from error
    except ValueError as error:
        raise Unservable(Reason.MODEL_INVALID, f"{where}: {CONFIG}: {error}; publish the adapter again") from error
    if not isinstance(config, dict) or not isinstance(config.get("r", 0), int):
        raise Unservable(Reason.MODEL_INVALID, f"{where}: {CONFIG} is no LoRA configuration; publish the adapter again")
    return config


def _read_weights(where: str, folder: Path) -> dict[str, Tensor]:
    try:
        return read_header(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise Unservable(
            Reason.MODEL_INVALID, f"{where}: has no {WEIGHTS}; save the adapter with PEFT as safetensors"
        ) from error
    except ValueError as error:
        raise Unservable(Reason.MODEL_INVALID, f"{where}: {error}; publish the adapter again") from error


def _check_features(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Unservable(Reason.ADAPTER_UNSUPPORTED, f"{where}: peft_type is {kind}, the engine serves LORA; {MERGE}")
    used = [key for key in _FEATURES if config.get(key) not in (None, False, [], {}, "none")]
    if str(config.get("init_lora_weights", True)).lower() not in PLAIN_INITS:
        used.append("init_lora_weights")
    if used:
        told = ", ".join(f"{key}: {json.dumps(config[key])[:80]}" for key in used)
        raise Unservable(Reason.ADAPTER_UNSUPPORTED, f"{where}: the engine cannot serve {told} unmerged; {MERGE}")


_FEATURES = (
    "use_dora", "modules_to_save", "bias", "lora_bias", "layer_replication", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
"""Keys of adapter_config.json whose features the engine leaves out or refuses; absent, false and empty are fine."""


def _check_origin(where: str, made_by: Mapping[str, Any], served: str | None) -> None:
    trained_on = made_by.get("base")
    digest = trained_on.get("digest") if isinstance(trained_on, Mapping) else None
    if digest and served and digest != served:
        raise Unservable(
            Reason.BASE_MISMATCH,
            f"{where}: was trained on the base {digest}, this deployment serves {served}; "
            "serve that base, or train the adapter again on this one",
        )


_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?"
)


_UNTUNED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Copies of the base's own weights, which PEFT adds when embeddings are adapted and the engine passes over."""


def _check_names(where: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """See that there is nothing but low-rank factors; returns the rank of each."""
    ranks = []
    for name, tensor in tensors.items():
        if name.endswith(_UNTUNED):
            continue
        match = _NAME.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise Unservable(
                Reason.ADAPTER_UNSUPPORTED, f"{where}: holds the tensor {name}, which is no low-rank factor; {MERGE}"
            )
        if match["side"] == "A":
            ranks.append(tensor.shape[0])
    if not ranks:
        raise Unservable(Reason.MODEL_INVALID, f"{where}: {WEIGHTS} holds no adapter; publish it again")
    return ranks


def _check_rank(where: str, config: Mapping[str, Any], ranks: Iterable[int], room: int) -> None:
    pattern = config.get("rank_pattern") or {}
    rank = max([config.get("r", 0), *ranks, *(value for value in pattern.values() if isinstance(value, int))])
    if rank <= room:
        return
    wider = next((allowed for allowed in get_args(LoraRank) if allowed >= rank), None)
    remedy = f"set spec.engine.maxLoraRank to {wider} (the pods are then replaced)" if wider else MERGE
    started = f"the engine was started with room for {room}" if room else "the engine was started without adapters"
    raise Unservable(Reason.ADAPTER_RANK_TOO_LARGE, f"{where}: has rank {rank}, {started}; {remedy}")


_LAYER = re.compile(r"(?:^|\.)(?P<stack>layers|h|blocks?)\.(?P<number>\d+)\.(?P<rest>.+)$")


def _place(module: str) -> tuple[str, str]:
    """Where a module stands, told so that prefixes which differ between disk and run time do not matter."""
    match = _LAYER.search(module)
    return (match["rest"], match["number"]) if match else (module.rsplit(".", 1)[-1], "")


def _check_shapes(
    where: str, config: Mapping[str, Any], adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    if not base:
        return
    known = _weights_by_place(base)
    rests = {rest for rest, _ in known}
    widths = _widths(adapter)
    if not any(_place(module)[0] in rests for module in widths):
        raise _mismatch(where, f"adapts {next(iter(widths))} and the base has nothing of that name")
    for module, (given, made) in widths.items():
        rest, number = _place(module)
        shapes = known.get((rest, number))
        if shapes is None:
            # Fused experts and the like have other names at run time: of those the engine is the judge.
            if rest in rests:
                raise _mismatch(where, f"adapts {module} and the base has no layer {number}")
            continue
        wanted = (given, made) if config.get("fan_in_fan_out") or "embed" in rest else (made, given)
        if not any(_agrees(wanted, shape) for shape in shapes):
            raise _mismatch(where, f"adapts {module} as {list(wanted)} and the base's is {list(shapes[0])}")


def _agrees(wanted: tuple[int | None, int | None], shape: tuple[int, ...]) -> bool:
    return all(want is None or want == have for want, have in zip(wanted, shape, strict=True))


def _weights_by_place(base: Mapping[str, Tensor]) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    known: defaultdict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for name, tensor in base.items():
        if name.endswith(".weight") and len(tensor.shape) == 2:
            known[_place(name.removesuffix(".weight"))].append(tensor.shape)
    return known


def _widths(adapter: Mapping[str, Tensor]) -> dict[str, tuple[int | None, int | None]]:
    """For each module the width that goes in and the one that comes out, as far as the factors tell."""
    widths: dict[str, tuple[int | None, int | None]] = {}
    for name, tensor in adapter.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        into, out = widths.get(match["module"], (None, None))
        if match["side"] == "A":
            into = tensor.shape[1]
        else:
            out = tensor.shape[0]
        widths[match["module"]] = (into, out)
    return widths


def _mismatch(where: str, fact: str) -> Unservable:
    return Unservable(
        Reason.BASE_MISMATCH, f"{where}: {fact}: it belongs to another base; serve that base, or another adapter"
    )
