"""FineTuneJob: attempts of a gang of pods, from sound inputs to an artifact with a digest."""

from functools import partial

from trimtab_operator.finetunejob.observe import observe
from trimtab_operator.finetunejob.plan import hindered, plan
from trimtab_operator.finetunejob.seen import Seen
from trimtab_operator.reconcile import Kind
from trimtab_operator.settings import Settings


def kind(settings: Settings) -> Kind[Seen]:
    """This room, as the engine takes it."""
    return Kind("FineTuneJob", partial(observe, settings=settings), plan, hindered)
