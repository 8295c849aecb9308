"""What is read of a FineTuneJob, and what is spared."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.unit.operator.cluster import Cluster
from tests.unit.operator.makers import RUNNING, SETTINGS, Story, pod
from trimtab_api import names
from trimtab_operator.finetunejob.observe import observe
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.plan import Gone, Key, Object

KEY = Key("FineTuneJob", "ns", "job")


def child(kind: str, name: str, owner: str = "u1", **fields: Any) -> Object:
    labels = names.labels("FineTuneJob", "job", owner)
    meta = {"name": name, "namespace": "ns", "labels": labels, "uid": name, "ownerReferences": [{"uid": owner}]}
    return {"kind": kind, "metadata": meta, **fields}


def progress(ago: float) -> Object:
    """Rank 0 reported so many seconds ago."""
    updated = (datetime.now(UTC) - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = {"step": 3, "totalSteps": 9, "updatedTime": updated}
    return child("ConfigMap", "job-progress", data={"progress.json": json.dumps({"attempt": 1, "progress": told})})


def looked(story: Story, *children: Object) -> tuple[Seen, list[str]]:
    """What a look sees, and what it asked for."""
    cluster = Cluster({"kind": "FineTuneJob", **story.job().dump()}, *children)
    found = asyncio.run(observe(cluster, KEY, SETTINGS))
    assert not isinstance(found, Gone)
    return found[1], cluster.asked


GANG, RUN = child("PyTorchJob", "job-1"), child("ConfigMap", "job-1-run")
ACCESS = [child(kind, "job-trainer") for kind in ("ServiceAccount", "Role", "RoleBinding")]


def test_a_run_that_reports_costs_four_requests() -> None:
    master = {"kind": "Pod", **pod("trainer", "job-1-master-0", 1, **RUNNING)}
    seen, asked = looked(Story().attempt(1), GANG, RUN, progress(5), master, *ACCESS)
    assert not seen.missing
    assert seen.report is not None
    assert asked == ["FineTuneJob job", "Pods", "PyTorchJob job-1", "ConfigMaps"]


def test_the_config_maps_of_a_run_are_missed_at_once() -> None:
    seen, _ = looked(Story().attempt(1), GANG, child("ConfigMap", "job-2-run"))
    assert {("ConfigMap", "job-1-run"), ("ConfigMap", "job-progress")} <= seen.missing


def test_the_right_to_report_is_missed_when_no_report_comes() -> None:
    seen, _ = looked(Story().attempt(1), GANG, RUN, progress(5))
    assert not seen.missing
    seen, _ = looked(Story().attempt(1), GANG, RUN, progress(90), ACCESS[0])
    assert seen.missing == {("Role", "job-trainer"), ("RoleBinding", "job-trainer")}


def test_an_account_that_the_user_names_is_not_ours_to_miss() -> None:
    story = Story(spec={"pod": {"serviceAccountName": "team"}}).attempt(1)
    seen, _ = looked(story, GANG, RUN, progress(90))
    assert seen.missing == {("Role", "job-trainer"), ("RoleBinding", "job-trainer")}


def test_what_a_predecessor_of_this_name_left_is_not_taken_for_ours() -> None:
    left = [child("PyTorchJob", "job-1", "u0"), child("ConfigMap", "job-progress", "u0", data={"progress.json": "{}"})]
    seen, _ = looked(Story().attempt(1), *left)
    assert seen.gang is None
    assert seen.report is None


def test_an_attempt_to_be_made_is_told_what_to_clear_away() -> None:
    story = Story().attempt(1, endTime="2026-01-01T00:00:00Z", reason="Stalled")
    story.attempt(2, endTime="2026-01-01T00:00:00Z", reason="Stalled").begun(3)
    seen, _ = looked(story, child("Job", "job-preflight"), GANG, RUN, child("PyTorchJob", "job-2"))
    assert {(each["kind"], each["metadata"]["name"]) for each in seen.needless} == {
        ("Job", "job-preflight"), ("PyTorchJob", "job-1"), ("ConfigMap", "job-1-run"),
    }  # fmt: skip
    assert not seen.missing, "what is not made yet is not missed"
