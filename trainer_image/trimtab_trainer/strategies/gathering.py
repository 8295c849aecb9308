"""Weights that are split over processes, made whole one at a time. Every process takes part, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def whole(weight: Any) -> Any:
    """The whole tensor, on this process's device; of a tensor that is not split, the tensor itself."""
    from torch.distributed.tensor import DTensor

    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    if isinstance(weight, DTensor):
        # What is offloaded must come back to where collectives reach it.
        return weight.detach().to(weight.device_mesh.device_type).full_tensor()
    return weight.detach()


def put(weight: Any, full: Any) -> None:
    """Write a whole tensor, which every process has, into a weight that FSDP2 split, or that is not split."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            part = distribute_tensor(full.to(mesh.device_type), mesh, weight.placements).to_local()
            weight.to_local().copy_(part)
        else:
            weight.copy_(full)


def length(weight: Any) -> int:
    """Rows of the whole tensor, without gathering it."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def gather(model: Any, first: bool, trainable: bool, dtype: Any) -> dict[str, Any]:
    """The weights in main memory by name, on the first process; the others take part and get nothing.

    `trainable`: only those that are trained. Floating ones are converted to `dtype`; None leaves them. No more than
    one whole tensor lies on a device at a time.
    """
    state: dict[str, Any] = {}
    for name, tensor in _tensors(model, trainable):
        full = whole(tensor)
        if first:
            kept = full if dtype is None or not full.is_floating_point() else full.to(dtype)
            state[name] = kept.to("cpu", copy=True)
    return state


def _tensors(model: Any, trainable: bool) -> Iterator[tuple[str, Any]]:
    for name, weight in model.named_parameters():
        if weight.requires_grad or not trainable:
            yield name, weight
    if trainable:
        return
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
