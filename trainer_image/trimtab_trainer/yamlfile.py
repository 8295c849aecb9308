"""A FineTuneJob from a YAML file, read as kubectl reads it and held against the API server's rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimtab_api.conditions import Reason
from trimtab_api.schema import ObjectMeta
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer.endings import Fault

KIND = "FineTuneJob"


class Loader(yaml.SafeLoader):
    """PyYAML takes an unquoted 1e-4 for text; kubectl, and whoever wrote it, for a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read(path: Path) -> tuple[ObjectMeta, FineTuneJobSpec]:
    """The one FineTuneJob of a file.

    Raises Fault(SpecInvalid) that names the field and says what to write instead.
    """
    try:
        documents = [each for each in yaml.load_all(path.read_text(), Loader=Loader) if each]
    except OSError as error:
        raise Fault(Reason.SPEC_INVALID, f"{path}: {error.strerror}", "Name a file that can be read.") from error
    except yaml.YAMLError as error:
        raise Fault(Reason.SPEC_INVALID, f"{path}: not YAML: {error}", "Correct the file.") from error
    jobs = [each for each in documents if isinstance(each, dict) and each.get("kind") == KIND]
    if len(jobs) != 1:
        raise Fault(Reason.SPEC_INVALID, f"{path}: has {len(jobs)} objects of kind {KIND}", "Give a file with one.")
    try:
        meta = ObjectMeta.model_validate(jobs[0].get("metadata") or {})
        spec = FineTuneJobSpec.model_validate(jobs[0].get("spec") or {})
    except ValidationError as error:
        raise Fault(Reason.SPEC_INVALID, f"{path}: {_fields(error)}", "Correct the fields that are named.") from error
    for field, holds, sentence in RULES:
        if not holds(spec):
            raise Fault(Reason.SPEC_INVALID, f"{path}: spec.{field}: {sentence}", "Correct the field.")
    return meta, spec


def _fields(error: ValidationError) -> str:
    return "; ".join(
        f"spec.{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()[:5]
    )


def _heads(spec: FineTuneJobSpec) -> bool:
    scratch = spec.model.scratch
    if scratch is None:
        return True
    heads = scratch.attention_heads
    return scratch.hidden_size % heads == 0 and heads % (scratch.key_value_heads or heads) == 0


Rule = tuple[str, Callable[[FineTuneJobSpec], Any], str]
RULES: tuple[Rule, ...] = (
    ("model", lambda s: (s.model.from_ is None) != (s.model.scratch is None), "give exactly one of from and scratch"),
    ("model.scratch", _heads, "hiddenSize must be a multiple of attentionHeads, and that of keyValueHeads"),
    (
        "tuner",
        lambda s: s.model.scratch is None or (s.tuner.type != "lora" and s.tuner.lora is None),
        "must be full, or left out: random weights have no base to adapt",
    ),
    (
        "tuner.lora",
        lambda s: s.tuner.type != "full" or s.tuner.lora is None,
        "remove it, or set type: lora: full tuning has no adapter",
    ),
    (
        "tuner.lora.targetRegex",
        lambda s: s.tuner.lora is None or s.tuner.lora.target_regex is None or s.tuner.lora.target_modules is None,
        "leave it out when targetModules is given",
    ),
    (
        "dataset.truncation",
        lambda s: s.method == "pretrain" or s.dataset.truncation != "split",
        "split cuts answers from their questions: only pretrain takes it, choose delete, left or right",
    ),
    (
        "dataset.validationSplit",
        lambda s: s.dataset.validation_split is None or not s.dataset.validation,
        "leave it out when validation is given: the rows come from one of them",
    ),
)
"""The rules across fields that the API server applies as CEL: field, what must hold, what to say when it does not."""
