"""A model with a scalar head in place of its language head: reward models, classifiers and rerankers are one thing.

To tune one, open a base with a fresh head (its weights are drawn anew, everything else must be there):

    model = scalar.load(local, "model.from", torch.float32, labels=1, seed=42, pad_token_id=tokenizer.pad_token_id)

To ask a published one, whole or an adapter with the base that `merge.lineage.fetch_with_base` brought along:

    judge = scalar.open_published(parts.further["ppo.rewardModel"], "ppo.rewardModel", torch.float32)
    rewards = judge([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]])[:, 0]

`judge.model` is frozen, in evaluation mode, and may be moved to a device; what has the judge's tokens already asks
`score_ids(judge.model, sequences)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_api.conditions import Reason
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import ADAPTER_CONFIG, LocalModel
from trimtab_trainer.model import loading, vision
from trimtab_trainer.model import tokenizer as tokenizers
from trimtab_trainer.model.loading import architecture
from trimtab_trainer.template import ChatTemplate

_SCORE = "score.weight"
Conversation = list[dict[str, Any]]
"""Messages with role and content; a reward is given for the last one."""
HEADS = ("score", "classifier")
"""What transformers calls the head, in one architecture or another."""
_HEAD = re.compile(r"base_model\.model\.(score|classifier)(\.\w+)*\.weight")
"""Names of heads in adapters; of several layers the last by name (out_proj) is the last."""


@dataclass(frozen=True)
class Judge:
    """A published model with a scalar head, and what its conversations are written with."""

    model: Any
    tokenizer: Any
    template: ChatTemplate

    def __call__(self, conversations: Sequence[Conversation], max_length: int | None = None, batch: int = 8) -> Any:
        """See `score`."""
        return score(self.model, self.tokenizer, self.template, conversations, max_length, batch)


def load(
    local: LocalModel,
    field: str,
    dtype: Any,
    *,
    labels: int,
    seed: int,
    pad_token_id: int,
    problem_type: str | None = None,
    **how: Any,
) -> Any:
    """The model with a head of `labels` outputs, its weights in `dtype`: a fresh head drawn with `seed`, or its own.

    `problem_type` is transformers' name of the loss; `how`: see loading.load. Raises Fault(ModelInvalid) when it does
    not open, when more is missing than a head, or when its own head has another number of outputs.
    """
    from transformers import set_seed

    found = architecture(local.path, field, local.reference)
    set_seed(seed)
    more = {"problem_type": problem_type} if problem_type else {}
    model, missing = _open(local, field, dtype, found, labels, more, how)
    if strange := sorted(missing - head_names(model)):
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field} {local.reference}: {len(strange)} weights are missing, first {', '.join(strange[:3])}",
        )
    set_padding(model, pad_token_id)
    return model


def open_published(local: LocalModel, field: str, dtype: Any) -> Judge:
    """A published reward model or classifier, whole or as an adapter on local.base.

    Raises Fault(ModelInvalid) when it is no such thing or does not open, Fault(ChatTemplateMissing) without a template.
    """
    adapted = (local.path / ADAPTER_CONFIG).is_file()
    model = _adapted(local, field, dtype) if adapted else _whole(local, field, dtype)
    tokenizer = tokenizers.load(local.path, field)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = ChatTemplate.of(tokenizers.own_template(tokenizer), None, None, special)
    set_padding(model, tokenizer.pad_token_id)
    return Judge(model.eval().requires_grad_(False), tokenizer, template)


def score(
    model: Any,
    tokenizer: Any,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    max_length: int | None = None,
    batch: int = 8,
) -> Any:
    """The head's raw outputs for whole conversations: float32 [conversations, labels], on the model's device.

    Rendered and tokenised as in training. Of one longer than `max_length` tokens the end is kept.
    """
    render = template.renderer()
    texts = [render(each) for each in conversations]
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return score_ids(model, [list(ids)[-(max_length or len(ids)) :] for ids in found], batch)


def score_ids(model: Any, sequences: Sequence[Sequence[int]], batch: int = 8) -> Any:
    """The head's raw outputs for sequences of token ids: float32 [sequences, labels], on the model's device.

    Sequences of like lengths are computed together, `batch` at a time, without gradients.
    """
    import torch

    pad = model.config.get_text_config().pad_token_id
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = torch.empty((len(sequences), model.config.num_labels), dtype=torch.float32, device=device)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            picked = order[start : start + batch]
            rows = [torch.as_tensor(sequences[index]) for index in picked]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = (torch.arange(ids.shape[1], device=device)[None, :] < lengths[:, None]).long()
            scores[picked] = model(input_ids=ids, attention_mask=mask).logits.float()
    return scores


def head_names(model: Any) -> set[str]:
    """Names of the weights that are the head alone."""
    backbone = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(backbone)}


def head_modules(model: Any) -> list[str]:
    """Names of the outermost modules that hold the head, for an adapter that saves them whole."""
    return sorted({name.split(".")[0] for name in head_names(model)})


def set_padding(model: Any, pad_token_id: int) -> None:
    """The head reads the last token that is no padding, by this id in the configuration."""
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = pad_token_id


def see_one_output(found: dict[str, Any], field: str, reference: str) -> None:
    """Raise Fault(ModelInvalid) unless the config.json is that of a model that gives one number."""
    outputs = own_labels(found)
    if outputs == 1:
        return
    gives = "has no head that gives scores" if outputs is None else f"gives {outputs} numbers; a reward is one"
    hint = "Name what a FineTuneJob of method rewardModel made."
    raise Fault(Reason.MODEL_INVALID, f"{field} {reference} {gives}", hint)


def own_labels(found: dict[str, Any]) -> int | None:
    """How many outputs the head of a published model has, by its config.json; None when it has no such head."""
    names = found.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return None
    return len(found.get("id2label") or ("0", "1"))


def _open(
    local: LocalModel,
    field: str,
    dtype: Any,
    found: dict[str, Any],
    labels: int,
    more: dict[str, Any],
    how: dict[str, Any],
) -> tuple[Any, set[str]]:
    """The model, and the names of the weights that its files do not hold. `more` is its configuration's."""
    from transformers import AutoModelForSequenceClassification

    own = own_labels(found)
    if own is not None and own != labels:
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field} {local.reference}: its head has {own} outputs, {labels} are wanted",
            "Start from a model without a head, or correct classification.numLabels.",
        )
    kind: Any = AutoModelForSequenceClassification
    if vision.senses(local.path):
        kind = vision.scalar_class(local.path, field)
        if own is None and how:
            raise Fault(
                Reason.SPEC_INVALID,
                f"{field} {local.reference} sees: a head is put on its backbone, neither quantised nor over devices",
                "Leave model.quantization out, and choose another distributed.strategy than deviceMap.",
            )
        if own is None:
            return _above(loading.load(local, field, dtype), kind, labels, more), {_SCORE}
    try:
        opened: Any = kind.from_pretrained(
            local.path,
            dtype=dtype,
            num_labels=labels,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **more,
            **how,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise Fault(Reason.MODEL_INVALID, f"{field} {local.reference} opens with no scalar head: {first}") from error
    model, info = opened
    return model, set(info["missing_keys"])


def _above(generation: Any, kind: Any, labels: int, more: dict[str, Any]) -> Any:
    """A fresh head on the backbone of a model that sees and writes.

    Its own class reads its files: transformers converts weights' names by the class that they were published for.
    """
    import torch

    config = generation.config
    config.update({"num_labels": labels, **more})
    with torch.device("meta"):
        model = kind(config)
    backbone = getattr(generation, model.base_model_prefix)
    setattr(model, model.base_model_prefix, backbone)
    model.score = torch.nn.Linear(config.get_text_config().hidden_size, labels, bias=False, dtype=generation.dtype)
    model._init_weights(model.score)
    empty = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert not empty, f"{empty[:3]} are neither the backbone's nor the head"
    return model


def _whole(local: LocalModel, field: str, dtype: Any) -> Any:
    found = architecture(local.path, field, local.reference)
    own = own_labels(found)
    if own is None:
        raise Fault(
            Reason.MODEL_INVALID,
            f"{field} {local.reference} is a {found.get('architectures')}: it has no head that gives scores",
            "Name what a FineTuneJob of method rewardModel or sequenceClassification made.",
        )
    model, missing = _open(local, field, dtype, found, own, {}, {})
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise Fault(
            Reason.MODEL_INVALID, f"{field} {local.reference}: {len(missing)} weights are missing, first {names}"
        )
    return model


def _adapted(local: LocalModel, field: str, dtype: Any) -> Any:
    from peft import PeftConfig, PeftModelForSequenceClassification, set_peft_model_state_dict
    from safetensors.torch import load_file

    if local.base is None:
        problem = f"{field} {local.reference} is an adapter, and the model that it was trained on is not here"
        raise Fault(Reason.MODEL_INVALID, problem, "Fold it into its base with a MergeJob, and name that.")
    settings: Any = PeftConfig.from_pretrained(str(local.path), local_files_only=True)
    if settings.task_type != "SEQ_CLS":
        problem = f"{field} {local.reference} is an adapter for {settings.task_type}: it has no head that gives scores"
        hint = "Name what a FineTuneJob of method rewardModel or sequenceClassification made."
        raise Fault(Reason.MODEL_INVALID, problem, hint)
    saved = load_file(local.path / "adapter_model.safetensors")
    labels = _outputs(saved, f"{field} {local.reference}")
    base = load(local.base, f"the base of {field}", dtype, labels=labels, seed=0, pad_token_id=0)
    settings.inference_mode = True
    wrapped = PeftModelForSequenceClassification(base, settings)
    result: Any = set_peft_model_state_dict(wrapped, saved)
    if result.unexpected_keys:
        problem = (
            f"{field} {local.reference}: {len(result.unexpected_keys)} tensors fit nothing in {local.base.reference}"
        )
        raise Fault(Reason.BASE_MISMATCH, problem, "Name the adapter's own base, or publish the adapter again.")
    return wrapped


def _outputs(saved: dict[str, Any], where: str) -> int:
    """How many outputs the head in an adapter's file has. Raises Fault(ModelInvalid) when there is none in it."""
    heads = sorted(name for name in saved if _HEAD.fullmatch(name))
    if not heads:
        problem = f"{where} brings no head: it would be random"
        raise Fault(Reason.MODEL_INVALID, problem, "Publish the adapter with modules_to_save: [score].")
    return int(saved[heads[-1]].shape[0])
