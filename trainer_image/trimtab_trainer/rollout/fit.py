"""Whether prompts and answers fit into the model together, seen before the first is drawn."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

from trimtab_api.conditions import Reason
from trimtab_trainer.data.prompts import PROMPT
from trimtab_trainer.endings import Fault
from trimtab_trainer.methods.parts import Parts


def see_room(parts: Parts, longest: int, field: str) -> None:
    """Raise Fault(SpecInvalid) when the longest prompt and `longest` tokens exceed the model's positions."""
    prompt = pyarrow.compute.max(pyarrow.compute.list_value_length(parts.train.data.column(PROMPT))).as_py()
    see_fits(parts.model, prompt, longest, field)


def see_fits(model: Any, prompt: int, longest: int, field: str) -> None:
    """The same for a prompt of so many tokens."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(room, int) and prompt + longest > room:
        raise Fault(
            Reason.SPEC_INVALID,
            f"{field}: {longest} tokens after a prompt of {prompt} are more than the {room} that the model is made for",
            f"Lower {field} to {max(room - prompt, 1)}, or lower dataset.maxLength.",
        )
