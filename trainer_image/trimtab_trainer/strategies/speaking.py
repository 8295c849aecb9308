"""A model that speaks while its weights are split over processes: each holds them whole for that time, or by layers.

Answers end at different tokens in different processes. While the weights are whole nobody has to wait for the others,
and a process draws no more random numbers than its own answers take, so the same seeds give the same answers with
every strategy. Whoever has no room for that, and no draws that must come again, goes through the layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from trl.models.utils import unwrap_model_for_generation


@contextmanager
def speaking(trainer: Any, wrapped: Any, settings: dict[str, Any], whole: bool) -> Iterator[Any]:
    """The model within `wrapped` to generate with, its settings of generation replaced by these.

    All processes call it together; unless `whole`, every forward pass is one of all of them as well.
    """
    with (
        unwrap_model_for_generation(
            wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=whole,
            generation_kwargs=settings,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        _unsharded(wrapped) if whole else nullcontext(),
    ):
        yield model


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """FSDP2's weights as whole tensors, through any number of forward passes of any of its modules."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    parts = [each for each in model.modules() if isinstance(each, FSDPModule) and each is not model]
    # FSDP takes the first module that runs forward for its root, and what speaks lies below an adapter's wrapper.
    model._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        for part in (model, *parts):
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
        for part in (model, *parts):
            part.reshard()
