"""Who owns a field decides whether apply can take it away."""

from __future__ import annotations

from typing import Any

from trimtab_operator.kube import owned_by_apply


def entry(manager: str, operation: str, **more: Any) -> dict[str, Any]:
    return {"manager": manager, "operation": operation, "apiVersion": "apps/v1", "fieldsType": "FieldsV1", **more}


def test_what_was_posted_and_patched_becomes_one_applied_entry() -> None:
    posted = entry("trimtab", "Update", fieldsV1={"f:spec": {"f:replicas": {}, "f:paused": {}}})
    applied = entry("trimtab", "Apply", fieldsV1={"f:spec": {"f:replicas": {}, "f:template": {"f:spec": {}}}})
    assert owned_by_apply([posted, applied]) == [
        entry("trimtab", "Apply", fieldsV1={"f:spec": {"f:replicas": {}, "f:paused": {}, "f:template": {"f:spec": {}}}})
    ]


def test_what_others_own_stays_theirs() -> None:
    theirs = entry("kubectl", "Update", fieldsV1={"f:metadata": {}})
    status = entry("trimtab", "Update", subresource="status", fieldsV1={"f:status": {}})
    ours = entry("trimtab", "Update", fieldsV1={"f:spec": {}})
    assert owned_by_apply([theirs, status, ours]) == [theirs, status, {**ours, "operation": "Apply"}]


def test_what_is_owned_by_apply_already_is_left() -> None:
    assert owned_by_apply([entry("trimtab", "Apply", fieldsV1={}), entry("kubectl", "Update", fieldsV1={})]) is None
