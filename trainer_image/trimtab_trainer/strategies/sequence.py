"""Sequences that several processes share: each holds a part of the tokens, and in attention a part of the heads.

Jacobs et al. 2023, arXiv:2309.14509 (Ulysses). Nothing but attention looks from one token at another; around it two
exchanges turn parts of the tokens into parts of the heads, and back. To whatever spreads weights, gradients and
optimiser over the processes, a part of a sequence is a row as any other: so every strategy does what it does without.

DeepSpeed's own (`UlyssesSPAttentionHF`) drops every mask without a word, splits with its own partition of the optimiser
alone, and stops in the middle of a round of rows when a run is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from trimtab_trainer.data.sequences import IGNORED, TOKENS, WEIGHTS
from trimtab_trainer.strategies.shareable import not_shareable, see_shareable

ATTENTION = "trimtab_sequence"
"""Name of the attention among those of transformers."""
SHIFTED = "shift_labels"
"""Key of a batch: for each token the one that comes next, or IGNORED. Parts cannot look beyond their end."""
LEAK = 0.1
"""Share of the change that the tokens of other processes make, that is borne as rounding."""


@dataclass(frozen=True)
class Part:
    """What this process has of each sequence."""

    rank: int
    """Its place among the processes that share a sequence, in the order of the tokens."""
    size: int
    """Processes that share a sequence."""
    row: int
    """Which of the groups of processes it belongs to: each takes rows of its own."""
    rows: int
    """How many groups there are."""
    group: Any
    """torch's group of the processes that share a sequence."""

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This process's tokens of a batch whose length is a multiple of `size`, with what comes after each."""
        ids, labels = batch["input_ids"], batch["labels"]
        length = ids.shape[1] // self.size
        mine = slice(self.rank * length, (self.rank + 1) * length)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        following = _following(labels, IGNORED)[:, mine]
        part = {
            "input_ids": ids[:, mine],
            "position_ids": positions[:, mine],
            "labels": following,
            SHIFTED: following,
            TOKENS: batch["attention_mask"][:, mine].sum(),
        }
        if WEIGHTS in batch:
            part[WEIGHTS] = _following(batch[WEIGHTS], 1.0)[:, mine]
        return part

    def total(self, number: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that share a sequence."""
        dist.all_reduce(number, group=self.group)
        return number

    def all_of(self, mine: Any) -> list[Any]:
        """What each of the processes that share a sequence has, in their order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered


def _following(values: torch.Tensor, last: float) -> torch.Tensor:
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=last)


def part_of(rank: int, world: int, size: int) -> Part:
    """The part of process `rank` where `size` neighbours share a sequence. All processes call it together."""
    groups = [list(range(first, first + size)) for first in range(0, world, size)]
    made = [dist.new_group(ranks) for ranks in groups]
    return Part(rank=rank % size, size=size, row=rank // size, rows=world // size, group=made[rank // size])


class Sharing:
    """A collator that keeps this process's part of each batch."""

    def __init__(self, collate: Any, part: Part):
        self._collate = collate
        self._part = part

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """This process's part."""
        return self._part.of(self._collate(rows))


def same_rows(loader: Any, part: Part) -> None:
    """Let the processes that share a sequence draw the same rows, by a loader that accelerate prepared."""
    sampler = loader.batch_sampler
    sampler.num_processes, sampler.process_index = part.rows, part.row
    # Alone there is nobody for whom a last batch would have to be filled up.
    sampler.even_batches = part.rows > 1


# ------------------------------------------------------------ attention

_part: Part | None = None
_shared = False


def share(model: Any, part: Part, length: int) -> None:
    """From now on the model's attention looks at the tokens of all processes that share a sequence, when it trains.

    When it does not train, what it is given is whole, but within `shared`. `length`: of the longest sequence. Raises
    Fault(ModelInvalid) for a model whose attention cannot be exchanged.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    global _part
    see_shareable(model.config.to_dict(), part.size, length)
    if model.config._attn_implementation != "sdpa":
        raise not_shareable(f"its attention is {model.config._attn_implementation}, not PyTorch's own")
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    _part = part


@contextmanager
def shared() -> Iterator[None]:
    """Within, a model that does not train is given parts of sequences as well."""
    global _shared
    before, _shared = _shared, True
    try:
        yield
    finally:
        _shared = before


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **given: Any
) -> tuple[torch.Tensor, None]:
    """[rows, heads, tokens, width] of this process's tokens; gives [rows, tokens, heads, width] of them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _part is None or not (module.training or _shared):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask=attention_mask, **given
        )
        return found
    if attention_mask is not None:
        raise not_shareable("its attention asks for a mask")
    heads = [_Exchange.apply(each, 1, 2, _part) for each in (query, key, value)]
    attended, _ = sdpa_attention_forward(module, *heads, attention_mask=None, **given)
    return _Exchange.apply(attended, 1, 2, _part), None


class _Exchange(torch.autograd.Function):
    """Splits one axis over the processes that share a sequence, and joins another from them."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, split: int, joined: int, part: Part) -> torch.Tensor:
        context.way = (joined, split, part)
        return _exchanged(tensor, split, joined, part)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return _exchanged(gradients[0], *context.way), None, None, None


def _exchanged(tensor: torch.Tensor, split: int, joined: int, part: Part) -> torch.Tensor:
    pieces = torch.stack(tensor.chunk(part.size, dim=split)).contiguous()
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=part.group)
    return torch.cat(list(received), dim=joined)


# ------------------------------------------------------------ the proof


class Seen(TrainerCallback):
    """Sees before the first step that a model given parts of a sequence says what it says of the whole."""

    def __init__(self, part: Part):
        self._part = part

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise Fault(ModelInvalid) when it does not."""
        see_shared(given["model"], self._part)


def see_shared(model: Any, part: Part) -> None:
    """Hold the logits of parts against those of the whole sequence. All processes call it together.

    Raises Fault(ModelInvalid) when they differ by more than rounding: attention that is not exchanged, a state that
    runs along the sequence, or positions that begin anew.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    device = next(model.parameters()).device
    ids = (torch.arange(8 * part.size, device=device) * 7 + 1).unsqueeze(0) % vocabulary
    batch = part.of({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    mine = slice(part.rank * 8, part.rank * 8 + 8)

    def logits(**given: Any) -> torch.Tensor:
        found: torch.Tensor = model(use_cache=False, **given).logits.float()
        return found

    training = model.training
    model.eval()
    with torch.no_grad():
        whole = logits(input_ids=ids)[:, mine]
        alone = logits(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        with shared():
            parts = logits(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    model.train(training)
    apart, meant = part.total(torch.stack([(parts - whole).abs().max(), (alone - whole).abs().max()])).tolist()
    if apart > LEAK * meant:
        raise not_shareable("its attention does not reach the tokens of the other processes")
