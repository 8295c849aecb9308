"""What belongs to a model besides its weights: configuration, tokenizer, template, and how it was made."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab_trainer.merge.places import Folder, read_small

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_GENERATION = ("generation_config.json",)
_OTHERS = ("*processor_config.json", "preprocessor*", "LICENSE*", "NOTICE*")


def sidecars(base: Folder, adapters: Sequence[Folder]) -> dict[str, bytes]:
    """The files that go along, by name. A tokenizer or template that an adapter brings was trained with, so it wins."""
    bringing = [folder for folder in adapters if _matching(folder, TOKENIZER)]
    tokenizer = [base] if not bringing else [bringing[0]]
    if bringing and not any(name in bringing[0].sizes for name in _VOCABULARIES):
        tokenizer = [base, bringing[0]]
    sources = [(base, _OTHERS), *((folder, TOKENIZER) for folder in tokenizer)]
    sources += [(folder, _GENERATION) for folder in [base, *reversed(adapters)]]
    return {name: read_small(folder, name) for folder, patterns in sources for name in _matching(folder, patterns)}


def configuration(document: Mapping[str, Any], dtype: str | None, untied: bool) -> dict[str, Any]:
    """The base's config.json made true for the merged model. `dtype` None keeps the base's."""
    made = json.loads(json.dumps(dict(document)))
    made.pop("_name_or_path", None)
    for part in (made, *(value for key, value in made.items() if key.endswith("_config") and isinstance(value, dict))):
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in part or (part is made and key == "dtype"):
                    part[key] = dtype
        if untied and (part is made or part.get("tie_word_embeddings")):
            part["tie_word_embeddings"] = False
    return dict(made)


def encoded(document: Mapping[str, Any]) -> bytes:
    """A document as the bytes of a JSON file."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def stage(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _matching(folder: Folder, patterns: Sequence[str]) -> list[str]:
    return [name for name in folder.sizes if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
