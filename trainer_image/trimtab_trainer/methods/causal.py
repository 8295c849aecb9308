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
from trimtab_trainer.data.sequences import IGNORED, WEIGHTS
from trimtab_trainer.data.streaming import Cursor, Loader, Stream
from trimtab_trainer.methods.documents import TOKENS, Apart, Documents
from trimtab_trainer.methods.observed import Observed
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import SeeingCollator, sight


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


class CausalTrainer(Observed, SFTTrainer):
    """SFTTrainer without its metrics.

    `stream`: records in place of a data set; the trainer then counts steps alone and keeps the stream's place.
    """

    def __init__(self, stream: Stream | None = None, **parts: Any):
        super().__init__(**parts)
        self._stream = stream

    def get_train_dataloader(self) -> Any:
        """Batches of the data set, or of this process's stream."""
        if self._stream is None:
            return super().get_train_dataloader()
        return Loader(self._stream, self.data_collator, self.args.per_device_train_batch_size)

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
        log_probs = outputs.log_probs if weights is None else outputs.log_probs * weights[:, 1:]
        loss = -log_probs.sum() / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is over all processes, and DDP averages their gradients.
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            # A mean of each forward pass; the accumulation adds them up when the tokens are counted beforehand.
            passes = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / passes
        return loss

    def count(self, inputs: Any) -> None:
        """Count the tokens of a batch, by its masks or, where documents stand in one row, by what it says."""
        if TOKENS in inputs:
            self.tokens_seen += inputs[TOKENS].to(self.tokens_seen.device)
        else:
            super().count(inputs)


def causal(parts: Parts) -> CausalTrainer:
    """The trainer of next-token prediction."""
    dataset = parts.config.spec.dataset
    several = dataset.packing is not None or dataset.padding_free
    return CausalTrainer(
        model=parts.model,
        args=arguments(parts.config, parts.folder, validated=parts.validation is not None),
        data_collator=_collator(parts),
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        processing_class=parts.tokenizer,
        callbacks=[*parts.callbacks, Apart()] if several else parts.callbacks,
        stream=parts.stream,
    )


def _collator(parts: Parts) -> Any:
    dataset, pad = parts.config.spec.dataset, parts.tokenizer.pad_token_id
    if dataset.packing is not None or dataset.padding_free:
        # Flash attention tells documents apart in a batch of one row alone.
        flash = "flash" in str(parts.model.config._attn_implementation)
        return Documents(pad, joined=dataset.padding_free or flash)
    return SeeingCollator(Collator(pad), sight(parts))
