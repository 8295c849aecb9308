"""Models beside the tuned one, as a reference, a teacher or a judge: whole in every process, or split as that one is.

DeepSpeed's third stage splits whatever is loaded while it is announced, and what is split speaks only once it is laid
out; so each model says before it is loaded which of the two it shall be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trimtab_trainer.strategies.fsdp import split_layers
from trimtab_trainer.strategies.zero import without_optimizer


@contextmanager
def whole() -> Iterator[None]:
    """What is loaded within is not split."""
    from transformers.integrations import deepspeed

    announced = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = announced


def laid_out(model: Any, arguments: Any, accelerator: Any) -> Any:
    """A frozen model as the tuned one is laid out: split with ZeRO-3 and FSDP2, else whole on its device or devices.

    `arguments` and `accelerator` are the trainer's. All processes call it together, and ask the model together.
    """
    from trl.distributed import DistributedBackend
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    backend = DistributedBackend(accelerator)
    if backend.is_zero3:
        with without_optimizer(arguments):
            return prepare_deepspeed(model, accelerator)
    if backend.is_fsdp:
        split_layers(model, arguments)
        return prepare_fsdp(model, accelerator)
    return model if hasattr(model, "hf_device_map") else model.to(arguments.device)
