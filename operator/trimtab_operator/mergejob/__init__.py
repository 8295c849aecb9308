"""MergeJob: waits for what it refers to, runs one pod at a time, and believes a digest alone."""

from __future__ import annotations

from functools import partial

from trimtab_operator.mergejob.observe import observe
from trimtab_operator.mergejob.plan import Seen, hindered, plan
from trimtab_operator.reconcile import Kind
from trimtab_operator.settings import Settings


def kind(settings: Settings) -> Kind[Seen]:
    """The room as reconcile knows it."""
    return Kind("MergeJob", partial(observe, settings), plan, hindered)
