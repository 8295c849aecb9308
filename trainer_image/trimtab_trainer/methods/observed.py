"""What every trainer here does beside its loss: it counts tokens, and it stops at a first loss that is no number."""

from __future__ import annotations

import math
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault


class Observed:
    """Mixed into a transformers.Trainer, before it in the order of bases."""

    def __init__(self, **parts: Any):
        super().__init__(**parts)
        trainer: Any = self
        self.tokens_seen = torch.zeros((), dtype=torch.int64, device=trainer.args.device)
        """Tokens that this process has learnt from or been given; padding left out."""
        self.lora_plus_ratio: float | None = None
        """How much faster the second factors of an adapter learn than the first."""
        self._first_loss_seen = False

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser, with two rates for the factors of an adapter where they are asked for (LoRA+)."""
        trainer: Any = self
        if self.lora_plus_ratio is None or trainer.optimizer is not None:
            base: Any = super()
            return base.create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        tuned = trainer.model if model is None else model
        kind, keywords = trainer.get_optimizer_cls_and_kwargs(trainer.args, tuned)
        trainer.optimizer = create_loraplus_optimizer(
            tuned,
            kind,
            lr=keywords.pop("lr"),
            loraplus_lr_ratio=self.lora_plus_ratio,
            loraplus_weight_decay=trainer.args.weight_decay,
            **keywords,
        )
        return trainer.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass.

        Raises Fault(AssertionFailed) when the first loss of the process is not finite.
        """
        self.count(inputs)
        base: Any = super()
        loss: torch.Tensor = base.training_step(model, inputs, num_items_in_batch)
        if not self._first_loss_seen:
            self._first_loss_seen = True
            if not math.isfinite(loss.item()):
                raise Fault(
                    Reason.ASSERTION_FAILED,
                    f"the first loss is {loss.item()}",
                    "Lower training.learningRate, or set model.dtype: float32.",
                )
        return loss

    def count(self, inputs: Any) -> None:
        """Count the tokens of a batch by its attention masks."""
        if not isinstance(inputs, dict):
            return
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self.tokens_seen += mask.sum().to(self.tokens_seen.device)

    def window(self) -> dict[str, Any]:
        """The metrics that are counted but not yet logged, as JSON: what TRL's trainers gather beside the loss."""
        trainer: Any = self
        return {
            "metrics": {
                name: list(values) for name, values in getattr(trainer, "_metrics", {}).get("train", {}).items()
            },
            "tokens": getattr(trainer, "_total_train_tokens", 0),
        }

    def resume_window(self, window: dict[str, Any]) -> None:
        """Go on with the metrics that an earlier process counted."""
        trainer: Any = self
        if hasattr(trainer, "_metrics"):
            for name, values in window["metrics"].items():
                trainer._metrics["train"][name] = list(values)
            trainer._total_train_tokens = window["tokens"]

    def published(self) -> Any:
        """The model as it is handed over, without what only the training needed."""
        trainer: Any = self
        return trainer.accelerator.unwrap_model(trainer.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing where the optimiser's checkpoint holds the weights: they would be gathered and written twice."""
        trainer: Any = self
        in_parts = trainer.args.parallelism_config is not None
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or in_parts):
            base: Any = super()
            base.save_model(output_dir, _internal_call)

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """No model card: args.json tells what was done."""
