"""The kinds' CEL rules as runs without an API server apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_trainer import rules
from trimtab_trainer.yamlfile import Loader

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
MINIMAL: dict[str, Any] = {
    "method": "sft",
    "model": {"from": {"huggingFace": {"repo": "acme/tiny"}}},
    "dataset": {"train": [{"from": {"inline": "{}"}}]},
}
JOBS = [
    (path, each["spec"])
    for path in sorted(EXAMPLES.rglob("*.yaml"))
    for each in yaml.load_all(path.read_text(), Loader=Loader)
    if each and each["kind"] == "FineTuneJob"
]


@pytest.mark.parametrize(("path", "document"), JOBS, ids=[path.stem for path, _ in JOBS])
def test_every_example_keeps_every_rule(path: Path, document: dict[str, Any]) -> None:
    assert list(rules.broken(FineTuneJobSpec.model_validate(document))) == []


@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"tuner": {"type": "full", "lora": {"rank": 4}}}, "tuner.lora", "full tuning has no adapter"),
        ({"storage": {"endpoint": "minio:9000"}}, "storage.endpoint", "must be http://HOST:PORT"),
        ({"pod": {"env": [{"name": "A"}, {"name": "LD_PRELOAD"}]}}, "pod.env[1].name", "load other code"),
        (
            {"pod": {"volumes": [{"claimName": "c", "mountPath": "/mnt/../work"}]}},
            "pod.volumes[0].mountPath",
            "must be an absolute path",
        ),
    ],
    ids=["of a block", "of a value", "of an item of a list", "of an item's value, with a function of Kubernetes"],
)
def test_a_broken_rule_names_its_field(changes: dict[str, Any], field: str, part: str) -> None:
    found = dict(rules.broken(FineTuneJobSpec.model_validate({**MINIMAL, **changes})))
    assert part in found[field]
