"""Next-token prediction over sequences that are already tokens and labels.

TRL's SFTTrainer brings the fused head, which never holds the logits of a whole batch. Its metrics are left out: four
collectives and three waits for the device in each forward pass. The loss is the same sum over the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.sft_trainer import SFTTrainer

from trimtab_trainer.arguments import arguments
from trimtab_trainer.data.sequences import IGNORED, TOKENS, WEIGHTS
from trimtab_trainer.data.streaming import Cursor, Loader, Stream
from trimtab_trainer.methods.documents import Apart, Documents
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import SeeingCollator, sight
from trimtab_trainer.strategies import sequence
from trimtab_trainer.strategies.layers import InParts


class Collator:
    """Pads a batch at its right end."""

    def __init__(self, pad_token_id: int, multiple: int = 1):
        self._pad = pad_token_id
        self._multiple = multiple

    def __call__(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        """A batch of equal lengths: input_ids, attention_mask, labels, and weights where a token counts not once."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self._multiple) * self._multiple
        ids = torch.full((len(rows), length), self._pad, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[index, :size] = torch.as_tensor(row["input_ids"])
            labels[index, :size] = torch.as_tensor(row["labels"])
            mask[index, :size] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if any(row.get(WEIGHTS) for row in rows):
            batch[WEIGHTS] = torch.ones((len(rows), length))
            for index, row in enumerate(rows):
                batch[WEIGHTS][index, : len(row[WEIGHTS])] = torch.as_tensor(row[WEIGHTS])
        return batch


class CausalTrainer(InParts, Observed, SFTTrainer):
    """SFTTrainer without its metrics.

    `stream`: records in place of a data set; the trainer then counts steps alone and keeps the stream's place.
    `part`: what this process has of each sequence that it trains on, where processes share them.
    """

    data_collator: Any

    def __init__(self, stream: Stream | None = None, part: sequence.Part | None = None, **parts: Any):
        super().__init__(**parts)
        self._stream = stream
        self._part = part
        if self.in_parts:
            self.gather_function = self.accelerator.gather_for_metrics = self._alike

    def _alike(self, losses: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The losses of rows that all processes evaluate alike, without what fills up the last batch."""
        state = self.accelerator.gradient_state
        left = int(state.remainder) if state.end_of_dataloader else 0
        return losses[:left] if left > 0 and losses.ndim else losses

    def get_train_dataloader(self) -> Any:
        """Batches of the data set, or of this process's stream; where sequences are shared, its part of them."""
        whole = self.data_collator
        collate = whole if self._part is None else sequence.Sharing(whole, self._part)
        if self._stream is not None:
            return Loader(self._stream, collate, self.args.per_device_train_batch_size)
        self.data_collator = collate
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = whole
        if self._part is not None:
            sequence.same_rows(loader, self._part)
        return loader

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch. Each process has rows of its own; those that share sequences take them in turn."""
        if self._part is None:
            base: Any = super()
            found: tuple[Any, Any, Any] = base.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return found
        tokens = self._get_num_items_in_batch([inputs], self.args.device)
        whole = {name: each.cpu() for name, each in inputs.items()}
        losses = [self._shared_loss(model, batch) for batch in self._part.all_of(whole)]
        mine = losses[self._part.rank] * self.accelerator.num_processes
        return mine / torch.as_tensor(tokens).clamp(min=1), None, None

    def _shared_loss(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the tokens' losses of a batch that those who share sequences have alike."""
        assert self._part is not None
        part = {name: each.to(self.args.device) for name, each in self._part.of(batch).items()}
        part = {name: each for name, each in part.items() if name not in (TOKENS, WEIGHTS)}
        with torch.no_grad(), sequence.shared():
            outputs = model(**part, use_cache=False, fused_lm_head=True)
        return self._part.total(-outputs.log_probs.sum())

    def window(self) -> dict[str, Any]:
        """See Observed. The place in a stream is part of it."""
        return {**super().window(), **({} if self._stream is None else {"cursor": self._stream.cursor.dump()})}

    def resume_window(self, window: dict[str, Any]) -> None:
        """See Observed."""
        super().resume_window(window)
        if self._stream is not None:
            self._stream.start = Cursor(**window["cursor"])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the learnt tokens' losses, each times its weight, over the number of them in the global batch."""
        weights = inputs.pop(WEIGHTS, None)
        inputs.pop(TOKENS, None)
        if return_outputs:
            base: Any = super()
            return base.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **routed, use_cache=False, fused_lm_head=True)
        tokens = outputs.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        log_probs = outputs.log_probs
        if weights is not None:
            log_probs = log_probs * (weights if sequence.SHIFTED in inputs else weights[:, 1:])
        loss = -log_probs.sum() / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is over all processes, and DDP averages their gradients; who takes the same rows counts once.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # A mean of each forward pass; the accumulation adds them up when the tokens are counted beforehand.
            passes = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / passes
        return loss

    def count(self, inputs: Any) -> None:
        """Count the tokens of a batch, by its masks or, where documents stand in one row, by what it says."""
        if self.in_parts and not self.accelerator.is_main_process:
            return
        if TOKENS in inputs:
            self.tokens_seen += inputs[TOKENS].to(self.tokens_seen.device)
        else:
            super().count(inputs)


def causal(parts: Parts) -> CausalTrainer:
    """The trainer of next-token prediction."""
    dataset, size = parts.config.spec.dataset, parts.config.spec.distributed.parallel.sequence
    callbacks, part = list(parts.callbacks), None
    if dataset.packing is not None or dataset.padding_free:
        callbacks.append(Apart())
    if size > 1:
        place = parts.group.place
        part = sequence.part_of(place.rank, place.world, size)
        sequence.share(parts.model, part, dataset.max_length)
        callbacks.append(sequence.Seen(part))
    return CausalTrainer(
        model=parts.model,
        args=arguments(parts.config, parts.folder, validated=parts.validation is not None),
        data_collator=_collator(parts),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=callbacks,
        stream=parts.stream,
        part=part,
    )


def _collator(parts: Parts) -> Any:
    dataset, pad = parts.config.spec.dataset, parts.tokenizer.pad_token_id
    if dataset.packing is not None or dataset.padding_free:
        # Flash attention tells documents apart in a batch of one row alone.
        flash = "flash" in str(parts.model.config._attn_implementation)
        return Documents(pad, joined=dataset.padding_free or flash)
    return SeeingCollator(Collator(pad, parts.config.spec.distributed.parallel.sequence), sight(parts))
