"""What is tuned: an existing model, or random weights in any architecture."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    LIST_SET,
    Model,
    OneOf,
    Rule,
    rules,
)
from trimtab_api.v1alpha1.source import ModelSource


class TokenizerTraining(Model):
    """A byte-level BPE learnt from the job's own rows, with a ChatML template."""

    vocab_size: Annotated[int, Field(ge=272, le=262144)] = 512
    """Size of the vocabulary, special tokens included."""


class Tokenizer(OneOf):
    """The tokenizer of a model that starts from random weights: exactly one member."""

    members: ClassVar[tuple[str, ...]] = ("from", "train")

    from_: Annotated[ModelSource | None, Field(alias="from")] = None
    """Take the tokenizer of this model."""
    train: TokenizerTraining | None = None
    """Learn one from the rows of this job."""


class Scratch(Model):
    """A model with random weights, in any architecture that transformers knows."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "self.hiddenSize % self.attentionHeads == 0",
                "must be a multiple of attentionHeads",
                field_path=".hiddenSize",
            ),
            Rule(
                "!has(self.keyValueHeads) || self.attentionHeads % self.keyValueHeads == 0",
                "must divide attentionHeads",
                field_path=".keyValueHeads",
            ),
        )
    )

    model_type: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """The architecture as transformers names it, for example llama or qwen2."""
    hidden_size: Annotated[int, Field(ge=16, le=65536)]
    """Width of the residual stream."""
    intermediate_size: Annotated[int | None, Field(ge=16, le=262144)] = None
    """Width of the feed-forward layers; by default 8/3 of hiddenSize, rounded up to a multiple of 16."""
    layers: Annotated[int, Field(ge=1, le=512)]
    """Number of blocks."""
    attention_heads: Annotated[int, Field(ge=1, le=512)]
    """Heads of each attention; hiddenSize is divided among them."""
    key_value_heads: Annotated[int | None, Field(ge=1, le=512)] = None
    """Heads of keys and values; by default as many as attentionHeads."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest sequence the model is made for, in tokens."""
    tie_embeddings: bool | None = None
    """Share the matrix of embeddings and head; by default true when hiddenSize is at most 2048."""
    extra: Annotated[str | None, Field(max_length=16384)] = None
    """JSON object with further keys of the architecture's configuration."""
    tokenizer: Tokenizer
    """The tokenizer; vocabulary and special tokens of the model follow it."""


class Quantization(Model):
    """The frozen weights are quantised as they are loaded, and an adapter is trained on them (Dettmers et al. 2023, arXiv:2305.14314)."""

    method: Literal["bnb4", "bnb8"]
    """How the linear layers are quantised: bitsandbytes with 4 or 8 bit."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of bnb4: the sixteen values that four bits stand for. nf4 fits weights that are normally distributed."""
    double_quant: bool = True
    """Of bnb4: quantise the scales as well, which saves about 0.4 bit a weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of bnb4: what a layer is unpacked to before it multiplies. auto is the precision that dtype stands for."""
    storage_dtype: Literal["auto", "uint8", "bfloat16"] = "auto"
    """Of bnb4: the type of the tensors that hold the packed bits. auto is uint8, and bfloat16 where fsdp2 or zero3 must split them."""


class FineTuneModel(Model):
    """What is tuned: an existing model, or random weights."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "has(self.from) != has(self.scratch)",
                "give exactly one of from (an existing model) and scratch (random weights)",
            ),
            Rule(
                "!has(self.scratch) || !has(self.newTokens) || size(self.newTokens) == 0",
                "leave it out: the tokenizer of a model from scratch is made from the rows, or taken as it is",
                field_path=".newTokens",
            ),
        )
    )

    from_: Annotated[ModelSource | None, Field(alias="from")] = None
    """The model to start from."""
    scratch: Scratch | None = None
    """Start from random weights; full tuning only."""
    new_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=256, json_schema_extra=LIST_SET)
    ] = Field(default_factory=list)
    """Special tokens that the tokenizer gets; each is one token from then on, and its embedding is trained. An adapter takes as many as the base's embeddings have rows to spare."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the arithmetic. auto is bfloat16 on an accelerator that has it, else float32. With full tuning the weights themselves are kept in float32."""
    quantization: Quantization | None = None
    """Quantise the weights at load (QLoRA): an adapter is trained on them, and belongs to the model as it was before. By default they are not quantised."""
