"""A FineTuneJob from a YAML file, read as kubectl reads it and held against the API server's rules."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from trimtab_api.conditions import Reason
from trimtab_api.schema import ObjectMeta
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import rules
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
    for field, sentence in rules.broken(spec):
        raise Fault(Reason.SPEC_INVALID, f"{path}: spec.{field}: {sentence}", "Correct the field.")
    return meta, spec


def _fields(error: ValidationError) -> str:
    return "; ".join(
        f"spec.{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()[:5]
    )
