"""How much memory a run takes, told before it starts: arithmetic on an architecture's sizes, without torch.

Weights, gradients and the optimiser's state are counted exactly. Activations follow Korthikanti et al. 2022
(arXiv:2205.05198) for what a block keeps for its backward pass, with the terms of today's decoders: gated feed-forward,
grouped keys, attention that never holds its matrix. How state is split follows Rajbhandari et al. 2020 (ZeRO,
arXiv:1910.02054): stage 1 splits the optimiser, 2 the gradients too, 3 the weights too. Packed weights follow Dettmers
et al. 2023 (QLoRA, arXiv:2305.14314): 4 bits and 0.127 of scales for each weight of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trimtab_api import inputs
from trimtab_api.resolve import GPU_RESOURCE
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.model import Scratch
from trimtab_api.v1alpha1.progress import Memory, ResolvedFineTune

GiB = 2**30
Strategy = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2", "deviceMap"]

PACKED = {4: 4.127 / 8, 8: 1.0}
"""Bytes of a weight that is packed into so many bits, its scales included."""
OPTIMIZERS = {"adamw": 2.0, "adamw8bit": 0.52, "lion": 1.0, "adafactor": 0.01, "sgd": 0.0}
"""Numbers as wide as a trainable weight that the optimiser keeps for each."""
ACCELERATOR = GiB
"""What a device's context, libraries and fragments take beside tensors."""
PROCESS = int(1.1 * GiB)
"""What a process with its libraries takes in main memory beside its model: measured, within 4 % of the whole."""
CERTAIN = 1.1
"""A run is refused when its estimate exceeds what is there by this factor."""

_PAIRS = ("dpo", "cpo", "simpo", "orpo", "rewardModel")
"""Methods whose row is two sequences."""
_OUTER = ("embeddings", "head", "embed_tokens", "lm_head", "wte")
_NOT_GATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "gpt_bigcode", "starcoder2")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    hidden: int
    layers: int
    inner: int
    """Width of the feed-forward layer, of one expert in a mixture."""
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    vocabulary: int
    tied: bool
    gated: bool = True
    experts: int = 1
    active: int = 1
    """Experts that a token visits."""
    shared: int = 0
    """Width of the expert that every token visits."""

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all blocks."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        width = 3 if self.gated else 2
        forward = width * self.hidden * (self.inner * self.experts + self.shared)
        return self.layers * (attention + forward + (self.hidden * self.experts if self.experts > 1 else 0))

    @property
    def mixture(self) -> int:
        """Weights of the experts that a token may visit; 0 without a mixture."""
        width = 3 if self.gated else 2
        return self.layers * width * self.hidden * self.inner * self.experts if self.experts > 1 else 0

    @property
    def outer(self) -> int:
        """Weights of embeddings and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear + self.outer + self.hidden * (2 * self.layers + 1)

    def adapter(self, rank: int) -> int:
        """Weights of an adapter of this rank on every linear layer outside of experts."""
        h, q, k = self.hidden, self.queries, self.keys
        attention = (h + q) + 2 * (h + k) + (q + h)
        inner = self.shared if self.experts > 1 else self.inner
        forward = (3 if self.gated else 2) * (h + inner) if inner else 0
        return self.layers * rank * (attention + forward)


@dataclass(frozen=True)
class Way:
    """How a run trains, as far as memory is concerned."""

    tuner: Literal["full", "lora"]
    rows: int
    """Rows in one forward pass of one process."""
    length: int
    """Tokens of a row at most."""
    shared: int = 1
    """Processes that share a row's tokens (distributed.parallel.sequence)."""
    tensor: int = 1
    """Processes that share every matrix of a block (distributed.parallel.tensor)."""
    expert: int = 1
    """Processes that share the experts (distributed.parallel.expert)."""
    rank: int = 8
    bits: int = 16
    """Of the frozen weights' linear layers: 4 or 8 when they are packed."""
    width: int = 2
    """Bytes of a number in the arithmetic."""
    pure: bool = False
    """Full tuning keeps weights, gradients and optimiser in the arithmetic's precision."""
    optimizer: str = "adamw"
    checkpointing: bool = True
    """Activations are computed again in the backward pass."""
    fused_head: bool = True
    """The logits of a batch are never held as a whole."""
    strategy: Strategy = "none"
    processes: int = 1
    """Processes that the state is split among."""
    devices: int = 1
    """Devices that one process lays its layers over (deviceMap)."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    frozen_copies: int = 0
    """Further models of the same shape that are split as the tuned one, for example a teacher."""
    judges: int = 0
    """Reward models, taken to be of the same shape: whole in every process."""
    speaks: bool = False
    """Answers are drawn, for which every process holds the whole weights."""
    beside: bool = False
    """An engine beside the trainer draws the answers."""
    reference: bool = False
    """Full tuning holds the model as it was, in the precision of its weights."""
    extra_trainable: int = 0
    """Weights that are trained in full beside an adapter."""
    accelerated: bool = True


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The sizes in a config.json; None when the architecture names them in a way that is not known."""
    text = config.get("text_config") or config.get("llm_config") or config
    read = _Reader(text)
    hidden, layers = read("hidden_size", "n_embd", "d_model"), read("num_hidden_layers", "n_layer", "num_layers")
    heads, vocabulary = read("num_attention_heads", "n_head", "num_heads"), read("vocab_size")
    if not (hidden and layers and heads and vocabulary):
        return None
    width = read("head_dim") or hidden // heads
    experts = read("num_experts", "num_local_experts", "n_routed_experts") or 1
    inner = read("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    return Shape(
        hidden=hidden,
        layers=layers,
        inner=(read("moe_intermediate_size") or inner) if experts > 1 else inner,
        queries=heads * width,
        keys=(read("num_key_value_heads", "n_head_kv") or heads) * width,
        vocabulary=vocabulary,
        tied=bool(tied),
        gated=text.get("model_type") not in _NOT_GATED,
        experts=experts,
        active=(read("num_experts_per_tok") or 1) if experts > 1 else 1,
        shared=read("shared_expert_intermediate_size") or 0,
    )


def shape_from_scratch(scratch: Scratch, vocabulary: int) -> Shape:
    """The sizes of a model from random weights; its `extra` may change them."""
    width = scratch.hidden_size // scratch.attention_heads
    return Shape(
        hidden=scratch.hidden_size,
        layers=scratch.layers,
        inner=scratch.intermediate_size or -(-scratch.hidden_size * 8 // 3 // 16) * 16,
        queries=scratch.hidden_size,
        keys=(scratch.key_value_heads or scratch.attention_heads) * width,
        vocabulary=vocabulary,
        tied=scratch.tie_embeddings if scratch.tie_embeddings is not None else scratch.hidden_size <= 2048,
        gated=scratch.model_type not in _NOT_GATED,
    )


def way_of(spec: FineTuneJobSpec, resolved: ResolvedFineTune, shape: Shape, rank: int | None = None) -> Way:
    """How a job trains. `rank`: of an adapter whose training goes on."""
    accelerated = GPU_RESOURCE in spec.pod.resources.limits
    narrow = spec.model.dtype in ("bfloat16", "float16") or (spec.model.dtype == "auto" and accelerated)
    narrow = narrow or spec.training.pure_bf16
    quantization, offload = spec.model.quantization, spec.distributed.offload
    gpus = max(1, int(spec.pod.resources.limits.get(GPU_RESOURCE, 1)))
    lora, packing = spec.tuner.lora, spec.dataset.packing
    saved = [name for name in (lora.modules_to_save if lora else ()) if name in _OUTER]
    adapters = {each.field for each in inputs.adapters(spec)}
    beside = [each.field for each in inputs.further(spec) if each.field not in adapters]
    return Way(
        tuner="lora" if resolved.tuner_type == "lora" else "full",
        rows=spec.training.per_device_batch_size * (2 if spec.method in _PAIRS else 1),
        length=max(spec.dataset.max_length, (packing.length or 0) if packing else 0) + _answer(spec),
        shared=spec.distributed.parallel.sequence,
        tensor=spec.distributed.parallel.tensor,
        expert=spec.distributed.parallel.expert,
        rank=rank or (lora.rank if lora else 8),
        width=2 if narrow else 4,
        optimizer=spec.training.optimizer,
        checkpointing=spec.training.gradient_checkpointing,
        bits={"bnb4": 4, "bnb8": 8}[quantization.method] if quantization else 16,
        pure=spec.training.pure_bf16,
        strategy=resolved.strategy,
        processes=resolved.world_size,
        devices=gpus if resolved.strategy == "deviceMap" else 1,
        offload_optimizer=offload.optimizer or (offload.parameters and resolved.strategy == "fsdp2"),
        offload_parameters=offload.parameters,
        frozen_copies=sum(not inputs.gives_rewards(each) for each in beside),
        judges=sum(inputs.gives_rewards(each) for each in beside),
        speaks=_answer(spec) > 0 and not spec.asks_vllm,
        beside=spec.asks_vllm,
        reference=resolved.tuner_type == "full" and _compares_with_itself(spec),
        extra_trainable=len(saved) * shape.vocabulary * shape.hidden,
        accelerated=accelerated,
    )


def _compares_with_itself(spec: FineTuneJobSpec) -> bool:
    """Whether the reference is the model as it was, in memory at each step."""
    if spec.method == "dpo":
        return spec.dpo is None or not (spec.dpo.ref_model is not None or spec.dpo.precompute_ref_log_probs)
    return spec.method in ("kto", "ppo") or (spec.grpo is not None and spec.grpo.beta > 0)


def _answer(spec: FineTuneJobSpec) -> int:
    """Tokens of the longest answer that is drawn and learnt from; 0 where none is drawn."""
    if spec.grpo is not None:
        return spec.grpo.max_completion_length
    if spec.ppo is not None:
        return spec.ppo.response_length
    return spec.gkd.max_completion_length if spec.gkd is not None and spec.gkd.lmbda > 0 else 0


def estimate(shape: Shape, way: Way) -> Memory:
    """Bytes on one device, by what they are for."""
    weights, gradients, optimizer = _state(shape, way)
    return Memory(
        parameters=shape.parameters,
        trainable_parameters=_trainable(shape, way),
        weights_bytes=round(weights / way.devices),
        gradients_bytes=round(gradients / way.devices),
        optimizer_bytes=round(optimizer / way.devices),
        activations_bytes=round(max(activations(shape, way), _gathered(shape, way))),
        overhead_bytes=ACCELERATOR if way.accelerated else PROCESS,
    )


def _gathered(shape: Shape, way: Way) -> float:
    """Whole weights of the tuned model, which are there while answers are drawn and nothing is kept of a pass."""
    if not way.speaks or way.processes == 1 or way.strategy not in ("zero3", "fsdp2"):
        return 0
    if way.tuner == "full":
        return shape.parameters * way.width
    return _adapted(shape, way)


def _adapted(shape: Shape, way: Way) -> float:
    """Bytes of a frozen model and what is trained beside it."""
    outer = (shape.parameters - shape.linear) * way.width
    return shape.linear * PACKED.get(way.bits, way.width) + outer + _trainable(shape, way) * 4


def activations(shape: Shape, way: Way) -> float:
    """What the forward pass of one micro-batch leaves for the backward pass, and what one block takes in between."""
    tokens = way.rows * way.length / way.shared
    block = _block(shape, way)
    kept = shape.layers * (shape.hidden * way.width) + block if way.checkpointing else shape.layers * block
    # In float32 with their gradient, beside what the head gave in the arithmetic's own precision.
    logits = 0 if way.fused_head else shape.vocabulary * (way.width + 4 + 4)
    hidden = shape.hidden * (way.width + 4)
    cast = 0.0
    if way.tuner == "full" and not way.pure and way.width < 4 and not way.strategy.startswith("zero"):
        # Autocast keeps a copy of each float32 weight in the arithmetic's precision until the pass is over.
        cast = _own(shape, way) * way.width * (_share(way, "weights") if way.strategy == "fsdp2" else 1)
    return tokens * (kept + logits + hidden) + cast


def changes(shape: Shape, way: Way) -> Iterator[tuple[str, int]]:
    """What would take less, cheapest first: what to write, and the bytes on one device that it saves."""
    now = estimate(shape, way).total_bytes
    tried: list[tuple[str, Way]] = []
    if not way.checkpointing:
        tried.append(("training.gradientCheckpointing: true", replace(way, checkpointing=True)))
    if way.rows > 1:
        fewer = max(1, way.rows // 2)
        tried.append((f"training.perDeviceBatchSize: {fewer}", replace(way, rows=fewer)))
    if way.optimizer == "adamw" and way.tuner == "full":
        tried.append(("training.optimizer: adamw8bit", replace(way, optimizer="adamw8bit")))
    if way.processes > 1 and way.tuner == "full" and way.strategy in ("none", "ddp", "zero1", "zero2"):
        tried.append(("distributed.strategy: zero3", replace(way, strategy="zero3")))
    if way.tuner == "full":
        tried.append(("tuner.type: lora", replace(way, tuner="lora")))
    elif way.bits == 16 and way.accelerated and not way.beside:
        tried.append(("model.quantization: {method: bnb4}", replace(way, bits=4)))
    if way.length > 512 and not way.speaks and not way.beside:
        tried.append((f"dataset.maxLength: {way.length // 2}", replace(way, length=way.length // 2)))
    for words, other in tried:
        saved = now - estimate(shape, other).total_bytes
        if saved > 0:
            yield words, saved


def shortage(shape: Shape, way: Way, available: int) -> tuple[str, str] | None:
    """Why a run cannot fit `available` bytes of one device, and what would make it fit; None when it may."""
    found = estimate(shape, way)
    if found.total_bytes <= available * CERTAIN:
        return None
    lacking = found.total_bytes - available
    where = "device" if way.accelerated else "process"
    message = (
        f"about {text(found.total_bytes)} are needed for each {where}, {text(available)} are there: "
        f"{text(found.weights_bytes)} weights, {text(found.gradients_bytes)} gradients, "
        f"{text(found.optimizer_bytes)} optimiser, {text(found.activations_bytes)} activations"
    )
    options = list(changes(shape, way))
    alone = [f"{words} ({text(saved)} less)" for words, saved in options if saved >= lacking]
    if alone:
        return message, f"Any of these makes it fit: {'; '.join(alone)}."
    partly = "; ".join(f"{words} ({text(saved)} less)" for words, saved in options)
    return message, f"No single change makes it fit; together these may: {partly or 'a larger device'}."


def text(amount: float) -> str:
    """Bytes for people."""
    return f"{amount / GiB:.1f} GiB" if amount >= 0.1 * GiB else f"{amount / 2**20:.1f} MiB"


def _own(shape: Shape, way: Way) -> float:
    """Weights of the tuned model that a process holds where layers are shared; all of them elsewhere."""
    return shape.parameters - shape.linear * (1 - 1 / way.tensor) - shape.mixture * (1 - 1 / way.expert)


def _trainable(shape: Shape, way: Way) -> int:
    return shape.parameters if way.tuner == "full" else shape.adapter(way.rank) + way.extra_trainable


def _state(shape: Shape, way: Way) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimiser in one process."""
    trainable: float = _own(shape, way) if way.tuner == "full" else _trainable(shape, way)
    masters = 0.0
    if way.tuner == "full":
        wide = way.width if way.pure else 4
        # The tuned model, and one like it to compare with.
        held = _own(shape, way) * (2 if way.reference else 1)
        weights = held * wide
        if way.strategy in ("zero1", "zero2", "zero3") and not way.pure and way.width < 4:
            # DeepSpeed computes with narrow weights and gradients, and keeps wide weights beside the moments.
            weights, masters = held * way.width, 4.0 * trainable
    else:
        wide = 4
        weights = _adapted(shape, way)
    weights += way.frozen_copies * shape.parameters * way.width
    return (
        weights * _share(way, "weights") * (0 if way.offload_parameters else 1)
        + way.judges * shape.parameters * way.width,
        trainable * (way.width if masters else wide) * _share(way, "gradients"),
        (trainable * wide * OPTIMIZERS[way.optimizer] + masters)
        * _share(way, "optimizer")
        * (0 if way.offload_optimizer else 1),
    )


def _share(way: Way, part: Literal["weights", "gradients", "optimizer"]) -> float:
    """The part of some state that one process keeps."""
    split = {
        "weights": ("zero3", "fsdp2"),
        "gradients": ("zero2", "zero3", "fsdp2"),
        "optimizer": ("zero1", "zero2", "zero3", "fsdp2"),
    }
    return 1 / way.processes if way.strategy in split[part] else 1.0


def _block(shape: Shape, way: Way) -> float:
    """Bytes for one token that a block keeps for its backward pass."""
    h, q, k, wide = shape.hidden, shape.queries, shape.keys, way.width
    inner = shape.inner * shape.active + shape.shared
    # Each norm keeps its input, that in float32, and its output; queries and keys are kept before and after turning.
    norms = 2 * h * (2 * wide + 4)
    attention = (2 * (q + k) + k + q) * wide
    forward = (4 if shape.gated else 2) * inner * wide
    dropped = 0.0
    if way.tuner == "lora":
        # Dropout gives every adapted layer an input of its own, with a mask.
        dropped = (5 * h + q + inner) * (wide + 1)
    return norms + attention + forward + h * wide + dropped


class _Reader:
    """Takes the first of several names that a configuration has."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config

    def __call__(self, *names: str) -> int | None:
        found = next((self._config[name] for name in names if isinstance(self._config.get(name), int)), None)
        return found if found is None else int(found)
