"""Whether prompts and answers fit into the model together, seen before the first is drawn."""

from __future__ import annotations

import pyarrow.compute

from trimtab_api.conditions import Reason
from trimtab_trainer.data.prompts import PROMPT
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts


def see_room(parts: Parts, longest: int, field: str) -> None:
    """Raise Fault(SpecInvalid) when the longest prompt and `longest` tokens exceed the model's positions."""
    room = getattr(parts.model.config.get_text_config(), "max_position_embeddings", None)
    prompt = pyarrow.compute.max(pyarrow.compute.list_value_length(parts.train.data.column(PROMPT))).as_py()
    if isinstance(room, int) and prompt + longest > room:
        raise Fault(
            Reason.SPEC_INVALID,
            f"{field}: {longest} tokens after a prompt of {prompt} are more than the {room} that the model is made for",
            f"Lower {field} to {max(room - prompt, 1)}, or lower dataset.maxLength.",
        )
