"""A model that gives vectors: a backbone, its pooling, and the files by which sentence-transformers opens both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.heads import Embedding
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model.loading import architecture

_POOLING = {"lastToken": "lasttoken", "mean": "mean", "cls": "cls"}


def load(local: LocalModel, field: str, dtype: Any, **how: Any) -> Any:
    """The backbone of a model, its weights in `dtype`; a language head is left out. `how`: see loading.load.

    Raises Fault(ModelInvalid) when it does not open or a weight is missing.
    """
    from transformers import AutoModel

    architecture(local.path, field, local.reference)
    try:
        opened: Any = AutoModel.from_pretrained(
            local.path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Fault(Reason.MODEL_INVALID, f"{field} {local.reference} does not open: {first}") from error
    model, info = opened
    # Encoders bring a layer that was made for another task; the vector does not come from there.
    unused = getattr(model, "pooler", None)
    if unused is not None:
        unused.requires_grad_(False)
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        named = ", ".join(missing[:3])
        raise Fault(
            Reason.MODEL_INVALID, f"{field} {local.reference}: {len(missing)} weights are missing, first {named}"
        )
    return model


def see_sizes(model: Any, asked: Embedding) -> None:
    """Raise Fault(SpecInvalid) when a size to train at is larger than the vector."""
    width = model.config.get_text_config().hidden_size
    for size in asked.matryoshka_dims or ():
        if size > width:
            hint = f"Name sizes up to {width}."
            raise Fault(Reason.SPEC_INVALID, f"embedding.matryoshkaDims: {size} is more than the vector has", hint)


def pool(asked: Embedding, states: Any, mask: Any) -> Any:
    """One vector for each sequence: [sequences, width] from states [sequences, tokens, width] and their mask."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling

    pooling = Pooling(states.shape[-1], _POOLING[asked.pooling])
    vectors = pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    return torch.nn.functional.normalize(vectors, dim=-1) if asked.normalize else vectors


def embed_ids(model: Any, asked: Embedding, ids: Any, mask: Any) -> Any:
    """Vectors [sequences, width] of padded token ids [sequences, tokens]."""
    return pool(asked, model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def write_layout(folder: Path, width: int, asked: Embedding) -> None:
    """Write what sentence-transformers needs beside the backbone: its modules, the pooling, the prompts."""
    from sentence_transformers import __version__
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    modules: list[Any] = [Pooling(width, _POOLING[asked.pooling]), *([Normalize()] if asked.normalize else [])]
    listed = [(Transformer, "")]
    for number, module in enumerate(modules, start=1):
        path = f"{number}_{type(module).__name__}"
        (folder / path).mkdir(exist_ok=True)
        module.save(str(folder / path))
        listed.append((type(module), path))
    _write(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"{kind.__module__}.{kind.__name__}"}
            for number, (kind, path) in enumerate(listed)
        ],
    )
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {"sentence_transformers": __version__},
            "prompts": {"query": asked.instruction or "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
