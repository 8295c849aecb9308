"""FineTuneJobs in, their objects and statuses out, byte for byte. UPDATE_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.operator.makers import NOW, SETTINGS, pod, published, terminated
from tests.unit.operator.merge_makers import trained
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_operator.finetunejob.plan import plan
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.plan import Plan
from trimtab_operator.settings import Rewards

HERE = Path(__file__).parent
ALLOWING = SETTINGS.model_copy(update={"rewards": Rewards(python=True)})
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def decided(document: dict[str, Any], **there: Any) -> Plan:
    producers = dict([trained("base", kind="model")])
    return plan(Seen(FineTuneJob.read(document), ALLOWING, producers, **there), NOW)


def way(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What is made and said when nothing goes wrong: inputs, attempt, gang, end."""
    first = decided(document)
    preflight = next(made for made in first.create if made["kind"] == "Job")
    preflight["metadata"] |= {"uid": "p1", "creationTimestamp": "2026-01-01T11:59:00Z"}
    sound = Ending(reason=Reason.INPUTS_SOUND, rows=40)
    checked = pod("preflight", "check", **terminated("preflight", 0, sound))
    second = decided(document, preflight=preflight, preflight_pods=(checked,))
    third = decided({**document, "status": second.status})
    gang = next(made for made in third.create if made["kind"] == "PyTorchJob")
    gang["metadata"] |= {"uid": "g1"}
    fourth = decided({**document, "status": second.status}, gang=gang)
    ended = pod("trainer", "master", 1, **terminated("pytorch", 0, published()))
    fifth = decided({**document, "status": fourth.status}, gang=gang, pods=(ended,))
    return [
        {"create": list(each.create), "apply": list(each.apply), "status": each.status}
        for each in (first, second, third, fourth, fifth)
    ]


@pytest.mark.parametrize(
    "example",
    [
        "who-are-you/base",
        "who-are-you/harbour",
        "every-field/finetunejob",
        "methods/grpo-python",
        "methods/grpo-vllm",
    ],
)
def test_the_example_becomes_what_it_became(example: str) -> None:
    text = (EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8")
    document = next(each for each in yaml.safe_load_all(text) if each["kind"] == "FineTuneJob")
    document["metadata"] |= {"namespace": "ns", "uid": "u1", "generation": 1}
    document = _numbers(document)
    document["spec"].pop("suspend", None)
    written = yaml.safe_dump(yaml.safe_load(yaml.safe_dump(way(document))), sort_keys=True, width=120)
    golden = HERE / f"{example.replace('/', '-')}.golden.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(written, encoding="utf-8")
    assert written == golden.read_text(encoding="utf-8"), f"differs from {golden.name}; UPDATE_GOLDEN=1 writes it anew"


def _numbers(value: Any) -> Any:
    """Numbers as kubectl reads them: PyYAML takes an unquoted 2e-3 for text."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and value[:1].isdigit() and "e-" in value:
        try:
            return float(value)
        except ValueError:
            return value
    return value
