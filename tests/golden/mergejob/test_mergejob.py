"""A MergeJob in, its objects and its status out, byte for byte. UPDATE_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from tests.unit.operator.makers import NOW, SETTINGS
from tests.unit.operator.merge_makers import trained
from trimtab_api.v1alpha1 import MergeJob
from trimtab_operator.mergejob.plan import Seen, plan

HERE = Path(__file__).parent
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "who-are-you" / "merged.yaml"


def test_the_example_becomes_what_it_became() -> None:
    document = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    document["metadata"] |= {"namespace": "ns", "uid": "m1", "generation": 1}
    producers = dict([trained("harbour"), trained("base", kind="model")])
    decided = plan(Seen(MergeJob.read(document), SETTINGS, producers), NOW)
    made = {"create": list(decided.create), "apply": list(decided.apply), "status": decided.status}
    text = yaml.safe_dump(yaml.safe_load(yaml.safe_dump(made)), sort_keys=True, width=120)
    golden = HERE / "merged.golden.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"differs from {golden.name}; UPDATE_GOLDEN=1 writes it anew"
