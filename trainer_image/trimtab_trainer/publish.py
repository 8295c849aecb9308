"""What a run hands over: safetensors, tokenizer with the template baked in, args.json; checked, then sealed."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_api.contract import Manifest, RunConfig
from trimtab_api.v1alpha1.status import Artifact, BaseReference
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import LocalModel
from trimtab_trainer.model import beneath, vector
from trimtab_trainer.model.adapter import WEIGHTS, name_base, rank_of
from trimtab_trainer.model.heads import Head, LanguageHead, VectorHead, head_of
from trimtab_trainer.model.tuning import Tuned
from trimtab_trainer.output import Output
from trimtab_trainer.output import publish as upload_whole
from trimtab_trainer.strategies.gathering import length

log = logging.getLogger(__name__)

APART = 0.05
"""Largest difference of two models' logits, relative to the largest logit, that the rounding of weights explains."""
_LIBRARIES = (
    "trimtab", "torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "deepspeed",
    "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """What an artifact was made from."""

    config: RunConfig
    base: LocalModel | None
    """None for a model from scratch."""
    dataset_digest: str
    sequences_digest: str
    template: str | None
    """The effective chat template."""
    world: int
    predictions: str | None = None
    """Where below the run's prefix the model's answers to the validation rows go; None when it is not asked."""

    @property
    def head(self) -> Head:
        """What the model answers with."""
        return head_of(self.config.spec)

    def base_reference(self) -> BaseReference | None:
        """The logical base with its digest."""
        return None if self.base is None else BaseReference(uri=self.base.reference, digest=self.base.digest)

    def made_by(self) -> dict[str, Any]:
        """The manifest's account: enough to tell two artifacts apart and to find what they came from."""
        base = self.base_reference()
        return {
            "kind": "FineTuneJob",
            "job": self.config.job.dump(),
            "attempt": self.config.attempt,
            "method": self.config.spec.method,
            "base": None if base is None else base.dump(),
            "datasetDigest": self.dataset_digest,
            "sequencesDigest": self.sequences_digest,
            "versions": versions(),
        }

    def arguments(self) -> dict[str, Any]:
        """args.json: how the artifact was made, with logical references alone."""
        spec = self.config.spec
        base = self.base_reference()
        return {
            "spec": spec.dump(),
            "resolved": self.config.resolved.dump(),
            "taskType": self.head.task,
            **self.head.document(),
            "base": None if base is None else base.dump(),
            "datasetDigest": self.dataset_digest,
            "inputs": [pin.dump() for pin in self.config.pins],
            "templateHash": None if self.template is None else "sha256:" + _sha256(self.template),
            "system": spec.template.system,
            "columns": [part.part.columns for part in self.config.train],
            "validationSplit": spec.dataset.validation_split,
            "seed": spec.training.seed,
            "dataSeed": spec.dataset.seed,
            "worldSize": self.world,
            "predictions": self.predictions,
            "microBatchSize": self.config.resolved.per_device_batch_size,
            "globalBatchSize": self.config.resolved.global_batch_size,
            "versions": versions(),
        }


@functools.cache
def versions() -> dict[str, str]:
    """The libraries that made the artifact; one that is not installed as a distribution is left out."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            log.debug("%s is not installed as a distribution", name)
    return found


def write(
    tuned: Tuned,
    tokenizer: Any,
    stops: list[int],
    dtype: Any,
    provenance: Provenance,
    folder: Path,
    processor: Any = None,
    gathered: dict[str, Any] | None = None,
) -> Any:
    """Write the artifact's files; `stops` are the ids that end an answer.

    Returns the model as whoever opens the files finds it; that which was trained may be of no use any more.
    `gathered`: the weights by name, when the model itself holds no more than a part of them.

    Raises Fault(AssertionFailed) when a saved adapter, read back, changes nothing or is not what was trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head, width = provenance.head, _width(tuned.model)
    generation = _generation(tuned.model) if isinstance(head, LanguageHead) else None
    if provenance.config.resolved.tuner_type == "lora":
        published = _write_adapter(tuned, provenance, folder, gathered)
    else:
        published = _write_model(tuned.model, dtype, folder, gathered, writes=isinstance(head, LanguageHead))
    if isinstance(head, VectorHead):
        tokenizer.model_max_length = provenance.config.spec.dataset.max_length
        vector.write_layout(folder, width, head.settings)
    if provenance.template is not None:
        tokenizer.chat_template = provenance.template
    if processor is not None:
        # With the model: whoever serves it prepares images as they were prepared here.
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation is not None:
        # The trainer replaces these by the tokenizer's single end-of-text token when it begins.
        generation.eos_token_id, generation.pad_token_id = stops, tokenizer.pad_token_id
        generation.save_pretrained(folder)
    (folder / "args.json").write_text(json.dumps(provenance.arguments(), indent=2, sort_keys=True) + "\n")
    return published


def follow(tuned: Tuned, dtype: Any, adapter: bool, folder: Path | None) -> Any:
    """What `write` returns, on the processes that wrote nothing.

    `folder`: the artifact, where the base took something in.
    """
    if folder is not None:
        return _over(_base(tuned), folder)
    return tuned.model if adapter else tuned.model.to(dtype)


def upload(output: Output, folder: Path, provenance: Provenance) -> Artifact:
    """Upload and seal the artifact; its digest is what the job has made."""
    manifest: Manifest = upload_whole(output, folder, output.layout.artifact, provenance.made_by())
    adapter = provenance.config.resolved.tuner_type == "lora"
    return Artifact(
        uri=output.layout.artifact,
        digest=manifest.digest,
        kind="adapter" if adapter else provenance.head.kind,
        task_type=provenance.head.task,
        base=provenance.base_reference() if adapter else None,
        dataset_digest=provenance.dataset_digest,
        rank=rank_of(folder) if adapter else None,
        size_bytes=manifest.size,
    )


def _write_adapter(tuned: Tuned, provenance: Provenance, folder: Path, gathered: dict[str, Any] | None) -> Any:
    assert provenance.base is not None, "an adapter has a base"
    tuned.model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"], state_dict=gathered)
    if tuned.terms:
        beneath.publish(folder, tuned.terms)
    name_base(folder, provenance.base.reference, provenance.head.task)
    (folder / "README.md").unlink(missing_ok=True)
    if gathered is not None:
        see_read_back(tuned.model, folder, gathered)
    elif tuned.terms:
        return see_equal(tuned, folder)
    else:
        see_effect(tuned.model, folder)
    return tuned.model


def see_read_back(model: Any, folder: Path, gathered: dict[str, Any]) -> None:
    """Raise Fault(AssertionFailed) when the saved adapter, read back, is not the one that was trained."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    trained = get_peft_model_state_dict(model, state_dict=gathered)
    if saved.keys() != trained.keys() or not all(torch.equal(saved[name], trained[name]) for name in saved):
        raise Fault(Reason.ASSERTION_FAILED, "the saved adapter, read back, is not the one that was trained")


def see_split_effect(wrapped: Any, model: Any) -> None:
    """Hold the logits with the adapter against those without, where each process holds a part of the weights.

    All processes call it together. `wrapped`: the model as it is trained, around `model`. Raises Fault(AssertionFailed)
    when the logits do not differ.
    """
    wrapped.eval()
    rows = length(model.get_input_embeddings().weight)
    adapted = _logits(wrapped, rows)
    with warnings.catch_warnings():
        # As in see_effect.
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
        with model.disable_adapter():
            plain = _logits(wrapped, rows)
    _see_change(adapted, plain, unread=False)


def see_effect(model: Any, folder: Path) -> None:
    """Read the saved adapter back and hold what the model says against the base.

    Raises Fault(AssertionFailed) when they do not differ.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    model.eval()
    result: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    adapted = _logits(model)
    with warnings.catch_warnings():
        # Biases that moved stay where they are; whether the factors change anything is asked here.
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
        with model.disable_adapter():
            plain = _logits(model)
    _see_change(adapted, plain, bool(result.unexpected_keys))


def see_equal(tuned: Tuned, folder: Path) -> Any:
    """Lay the saved adapter over the base as it was, and hold its logits against those of the trained model.

    Returns the model with the saved adapter; the trained one is gone. Raises Fault(AssertionFailed) when they differ by
    more than the rounding of the weights, or equal the base's.
    """
    tuned.model.eval()
    trained = _logits(tuned.model)
    base = _base(tuned)
    plain = _logits(base)
    published = _over(base, folder)
    adapted = _logits(published)
    _see_change(adapted, plain, unread=False)
    apart = float((adapted - trained).abs().max() / trained.abs().max())
    log.info("the published adapter is within %.2g of the trained model", apart)
    if apart > APART:
        raise Fault(
            Reason.ASSERTION_FAILED,
            f"the published adapter's logits are {apart:.2g} apart from the trained model's",
            "Set model.dtype: float32, or tuner.lora.initWeights: default.",
        )
    return published


def _base(tuned: Tuned) -> Any:
    """The base as it was before it took anything in. Uses the trained model up."""
    base = tuned.model.unload()
    for term in reversed(tuned.terms):
        beneath.give_back(base, term)
    return base


def _over(base: Any, folder: Path) -> Any:
    """The base with a saved adapter."""
    from peft import PeftModel

    published = PeftModel.from_pretrained(base, str(folder))
    published.eval()
    return published


def _logits(model: Any, rows: int | None = None) -> Any:
    """Logits, or the states below a head of numbers, in float32, for the first tokens of the vocabulary.

    `rows`: how many tokens it has, where the model cannot say.
    """
    import torch

    weight = next(model.parameters()) if rows else model.get_input_embeddings().weight
    ids = torch.arange(min(32, rows or weight.shape[0]), device=weight.device).unsqueeze(0)
    with torch.no_grad():
        said = model(input_ids=ids, output_hidden_states=True)
    # A head that was trained in full would differ in any case; the states that it reads tell whether the adapter acts.
    return (said.logits if "logits" in said and said.logits.dim() == 3 else said.hidden_states[-1]).float()


def _see_change(adapted: Any, plain: Any, unread: bool) -> None:
    import torch

    if unread or not torch.isfinite(adapted).all() or torch.equal(adapted, plain):
        raise Fault(
            Reason.ASSERTION_FAILED,
            "the saved adapter, read back, does not change what the model says",
            "Raise training.learningRate or training.maxSteps.",
        )


def _write_model(model: Any, dtype: Any, folder: Path, gathered: dict[str, Any] | None, writes: bool) -> Any:
    import torch

    # Training switches the cache off; whoever generates with the model wants it.
    model.config.use_cache = writes
    if gathered is not None:
        model.config.dtype = dtype
        # The library would gather what processes share once more, in all of them together.
        vars(model.config).pop("distributed_config", None)
    elif dtype != torch.float32:
        model = model.to(dtype)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="5GB", state_dict=gathered)
    (folder / "README.md").unlink(missing_ok=True)
    return model


def _generation(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.generation_config


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
