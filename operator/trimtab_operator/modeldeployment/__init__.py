"""ModelDeployment: pods behind one address, adapters that come and go, a status that tells what engines serve."""

from __future__ import annotations

from functools import partial

from trimtab_operator.modeldeployment.observe import observe
from trimtab_operator.modeldeployment.plan import Seen, hindered, plan
from trimtab_operator.reconcile import Kind
from trimtab_operator.settings import Settings


def kind(settings: Settings) -> Kind[Seen]:
    """The room as reconcile knows it."""
    return Kind("ModelDeployment", partial(observe, settings), plan, hindered)
