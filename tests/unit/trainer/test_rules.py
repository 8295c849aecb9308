"""The kinds' CEL rules as runs without an API server apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from tests.api.test_cel import ACCEPTED, REFUSED, Row, build
from tests.unit.trainer.conftest import SCRATCH
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec, Method
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


HUB = {"huggingFace": {"repo": "acme/other"}}
GRPO = {"method": "grpo", "grpo": {"rewards": [{"name": "format"}]}}
PPO = {"method": "ppo", "ppo": {"rewardModel": {"from": HUB}}}
GKD = {"method": "gkd", "gkd": {"teacher": {"from": HUB}}}


@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"method": "grpo"}, "grpo", "give grpo.rewards"),
        ({**GRPO, "method": "sft"}, "grpo", "remove it, or set method: grpo"),
        ({"method": "ppo"}, "ppo", "give ppo.rewardModel"),
        ({**PPO, "method": "sft"}, "ppo", "remove it, or set method: ppo"),
        ({"method": "gkd"}, "gkd", "give gkd.teacher"),
        ({**GKD, "method": "sft"}, "gkd", "remove it, or set method: gkd"),
        (
            {**GRPO, "grpo": {"rewards": [{"name": "format"}], "importanceSampling": "sequence", "lossType": "cispo"}},
            "grpo.lossType",
            "must be grpo with importanceSampling: sequence",
        ),
        (
            {**GRPO, "training": {"gradientAccumulationSteps": 5}, "distributed": {"processesPerNode": 2, "nodes": 2}},
            "grpo.numGenerations",
            "whole groups of answers",
        ),
        ({**PPO, "model": {**MINIMAL["model"], "newTokens": ["<x>"]}}, "model.newTokens", "does not know them"),
        ({**GKD, "dataset": {**MINIMAL["dataset"], "loss": "all"}}, "dataset.loss", "whole answers"),
        *(
            ({**job, "dataset": {**MINIMAL["dataset"], "truncation": "right"}}, "dataset.truncation", "delete or left")
            for job in (GRPO, PPO, GKD)
        ),
        *(
            (
                {**job, "model": {"scratch": SCRATCH}, "dataset": {**MINIMAL["dataset"], "maxLength": 64}},
                "model.scratch",
                "random weights say nothing",
            )
            for job in (GRPO, PPO, GKD)
        ),
    ],
)
def test_what_the_model_says(changes: dict[str, Any], field: str, part: str) -> None:
    found = dict(rules.broken(FineTuneJobSpec.model_validate({**MINIMAL, **changes})))
    assert part in found[field]


HEAD = {"tuner": {"lora": {"targetModules": ["q_proj", "lm_head"]}}}


@pytest.mark.parametrize("method", get_args(Method))
def test_an_adapter_on_the_head(method: str) -> None:
    found = dict(rules.broken(FineTuneJobSpec.model_validate({**MINIMAL, **HEAD, "method": method})))
    assert "leave lm_head out" in found["tuner.lora.targetModules"]


SHARED = {"parallel": {"sequence": 2}}
FULL_TUNING = {"tuner": {"type": "full"}}


@pytest.mark.parametrize(
    ("changes", "field", "part"),
    [
        ({"method": "dpo", "distributed": SHARED}, "sequence", "method sft or pretrain"),
        ({"distributed": {**SHARED, "strategy": "deviceMap"}}, "sequence", "there is one process"),
        ({"distributed": {**SHARED, "nodes": 3, "processesPerNode": 1}}, "sequence", "must divide distributed.nodes"),
        (
            {"distributed": SHARED, "dataset": {**MINIMAL["dataset"], "packing": {}}},
            "sequence",
            "keeps documents apart",
        ),
        ({"distributed": SHARED, "training": {"neftuneAlpha": 5}}, "sequence", "length of a whole sequence"),
        ({"distributed": {"parallel": {"context": 2}}}, "context", "must be 1"),
        *(
            ({**FULL_TUNING, "distributed": {"parallel": {name: 2}, **spread}, **fields}, name, part)
            for name in ("tensor", "expert")
            for spread, fields, part in (
                ({"parallel": {name: 2, "sequence": 2}}, {}, "or sequence be 1"),
                ({}, {"method": "dpo"}, "method sft or pretrain"),
                ({}, {"tuner": {}}, "or tuner.type be full"),
                ({"strategy": "zero3"}, {}, "or strategy auto"),
                ({"nodes": 4, "processesPerNode": 1}, {}, "all processes share each layer"),
                ({}, {"training": {"pureBf16": True}}, "were not tried with layers that are shared"),
            )
        ),
        ({**FULL_TUNING, "distributed": {"parallel": {"tensor": 2, "expert": 2}}}, "expert", "or tensor be 1"),
    ],
)
def test_processes_that_work_at_one_row(changes: dict[str, Any], field: str, part: str) -> None:
    found = dict(rules.broken(FineTuneJobSpec.model_validate({**MINIMAL, **changes})))
    assert part in found[f"distributed.parallel.{field}"]


@pytest.mark.parametrize(
    "changes",
    [
        GRPO,
        PPO,
        {**GKD, "dataset": {**MINIMAL["dataset"], "truncation": "left"}},
        {**GRPO, "training": {"gradientAccumulationSteps": 4}, "distributed": {"processesPerNode": 2}},
        {**GRPO, "grpo": {"rewards": [{"name": "format"}], "importanceSampling": "sequence"}},
    ],
)
def test_what_the_model_may_say(changes: dict[str, Any]) -> None:
    assert not list(rules.broken(FineTuneJobSpec.model_validate({**MINIMAL, **changes})))


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


def read(changes: dict[str, Any]) -> FineTuneJobSpec | None:
    """The spec of a row, or None when its shape alone is wrong already."""
    try:
        return FineTuneJobSpec.model_validate(build("FineTuneJob", changes)["spec"])
    except ValidationError:
        return None


TABLE = [
    row
    for row in REFUSED
    if row.kind == "FineTuneJob" and "Duplicate value" not in row.part and read(row.changes) is not None
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_what_the_api_server_refuses_is_refused_here(row: Row) -> None:
    spec = read(row.changes)
    assert spec is not None
    assert row.part in dict(rules.broken(spec))[row.field.removeprefix("spec.")]


@pytest.mark.parametrize("number", [n for n, (kind, _) in enumerate(ACCEPTED) if kind == "FineTuneJob"])
def test_what_the_api_server_lets_pass_passes_here(number: int) -> None:
    changes = {path: value for path, value in ACCEPTED[number][1].items() if value is not None}
    spec = read(changes)
    assert spec is not None
    assert list(rules.broken(spec)) == []
