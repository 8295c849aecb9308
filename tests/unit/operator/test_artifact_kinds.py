"""What a resource may take of what a job made: its kind, and what it does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.operator.makers import DIGEST
from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1 import FineTuneJob
from trimtab_api.v1alpha1.status import Artifact, ArtifactKind, TaskType
from trimtab_operator.sources import Reference, Unmet, artifact_of

REFERENCE = Reference("FineTuneJob", "made")


def producer(kind: ArtifactKind, task: TaskType | None) -> FineTuneJob:
    artifact = Artifact(uri="s3://bucket/made", digest=DIGEST, kind=kind, task_type=task)
    job: dict[str, Any] = {
        "metadata": {"name": "made"},
        "spec": {
            "method": "sft",
            "model": {"from": {"huggingFace": {"repo": "acme/tiny"}}},
            "dataset": {"train": [{"from": {"inline": "{}"}}]},
        },
        "status": {"artifact": artifact.dump()},
    }
    return FineTuneJob.read(job)


@pytest.mark.parametrize(
    ("kind", "task", "wanted", "said"),
    [
        ("model", "CAUSAL_LM", ("model",), None),
        ("model", None, ("model",), None),
        ("adapter", "CAUSAL_LM", ("adapter",), None),
        ("adapter", None, ("adapter",), None),
        (
            "classifier",
            "SEQ_CLS",
            ("model",),
            "made a classifier where a model is needed. Name a job of another method.",
        ),
        ("embedder", "FEATURE_EXTRACTION", ("model",), "made an embedder where a model is needed"),
        ("predictions", None, ("model",), "made predictions where a model is needed. That job learns nothing"),
        ("adapter", "CAUSAL_LM", ("model",), "fold the adapter into its base with a MergeJob"),
        ("model", "CAUSAL_LM", ("adapter",), "Name a FineTuneJob with tuner.type lora."),
        ("adapter", "SEQ_CLS", ("adapter",), "gives scores; what writes text is needed"),
        ("adapter", "FEATURE_EXTRACTION", ("adapter",), "gives vectors; what writes text is needed"),
    ],
)
def test_what_serving_takes(
    kind: ArtifactKind, task: TaskType | None, wanted: tuple[ArtifactKind, ...], said: str | None
) -> None:
    found = artifact_of("model.from", REFERENCE, wanted, producer(kind, task), task="CAUSAL_LM")
    if said is None:
        assert isinstance(found, Artifact)
        return
    assert isinstance(found, Unmet)
    assert found.reason is Reason.MODEL_INVALID
    assert said in found.message


def test_a_job_that_asks_for_no_task_takes_any() -> None:
    found = artifact_of("tuner.continueFrom", REFERENCE, ("adapter",), producer("adapter", "SEQ_CLS"))
    assert isinstance(found, Artifact)
