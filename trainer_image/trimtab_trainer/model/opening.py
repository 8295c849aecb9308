"""The model of a job, opened with the head that its method asks for."""

from __future__ import annotations

from typing import Any

from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import loading, scalar, vector
from trimtab_trainer.model.heads import Head, ScalarHead, VectorHead


def open_model(local: LocalModel, field: str, dtype: Any, head: Head, seed: int, pad_token_id: int, **how: Any) -> Any:
    """The model with its weights in `dtype`; a fresh head is drawn with `seed`. `how`: see loading.load.

    Raises Fault when it does not open, or more than a head is missing.
    """
    if isinstance(head, ScalarHead):
        model = scalar.load(
            local,
            field,
            dtype,
            labels=head.size,
            seed=seed,
            pad_token_id=pad_token_id,
            problem_type=head.problem_type,
            **how,
        )
        return prepare(model, head)
    if isinstance(head, VectorHead):
        return prepare(vector.load(local, field, dtype, **how), head)
    return loading.load(local, field, dtype, **how)


def prepare(model: Any, head: Head) -> Any:
    """The model with what its configuration says of the head."""
    if isinstance(head, ScalarHead) and head.names:
        model.config.id2label = dict(enumerate(head.names))
        model.config.label2id = {name: number for number, name in enumerate(head.names)}
    if isinstance(head, VectorHead):
        vector.see_sizes(model, head.settings)
    if not hasattr(model, "lm_head"):
        # Nothing is generated: a cache would only be memory.
        model.config.use_cache = False
    return model
