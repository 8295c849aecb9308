"""The rows, how they become sequences of tokens, and how a conversation becomes text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trimtab_api.schema import (
    LIST_ATOMIC,
    Model,
    Rule,
    rules,
)
from trimtab_api.v1alpha1.source import DataSource, FolderSource


class DataPart(Model):
    """One source of rows."""

    from_: Annotated[DataSource, Field(alias="from")]
    """Where the rows are."""
    format: Literal["auto", "messages", "queryResponse", "alpaca", "sharegpt", "text"] = "auto"
    """How a row is written: messages (OpenAI's, with tool_calls, tool_call and tool_response turns, or Anthropic's blocks), queryResponse, alpaca (instruction, input, output), sharegpt (conversations of from and value) or text. auto tells by the columns of the first row."""
    columns: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    """Columns to rename before the format is read: from the name in the file to the standard name."""
    media_from: FolderSource | None = None
    """Folder in which the paths of images, videos and sound begin that rows name; by default the one that the data file lies in."""
    sample: Annotated[int | None, Field(ge=1, le=1_000_000_000)] = None
    """Take this many rows, drawn with the data seed; more than there are repeats them."""


DataParts = Annotated[list[DataPart], Field(max_length=32, json_schema_extra=LIST_ATOMIC)]


class Interleave(Model):
    """Rows drawn from the parts in turns, in place of one part after the other."""

    weights: Annotated[
        list[Annotated[float, Field(gt=0, le=1_000_000)]], Field(max_length=32, json_schema_extra=LIST_ATOMIC)
    ] = Field(default_factory=list)
    """How often each part is drawn, one number for each part of train; only their proportions count. By default all the same."""
    stopping: Literal["firstExhausted", "allExhausted"] = "firstExhausted"
    """firstExhausted ends the mixture with the first part that has no more rows; allExhausted begins such a part anew until every part has been read to its end."""


class Streaming(Model):
    """Rows read, checked and tokenised while the training runs: for data that no disk holds, or that need not be read whole."""

    shuffle_buffer: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Rows of a process that are shuffled together, and held in memory."""


class Packing(Model):
    """Short sequences side by side in one, so that no padding is computed. Documents never see each other."""

    strategy: Literal["bfd", "bfdSplit", "wrapped"] = "bfd"
    """bfd puts whole sequences where they fit best, bfdSplit first cuts those that are longer than a pack, wrapped fills every pack and cuts wherever it is full. The latter two are for pretrain."""
    length: Annotated[int | None, Field(ge=8, le=1_048_576)] = None
    """Tokens of a pack. By default maxLength."""


class Multimodal(Model):
    """How images and videos of rows are prepared. What is not said here is as the model's processor has it; the artifact's processor has both."""

    max_pixels: Annotated[int | None, Field(ge=784, le=178_956_970)] = None
    """Most pixels of an image; a larger one is made smaller, and becomes fewer tokens. For models that take images of any size, as Qwen2-VL and its successors."""
    video_max_pixels: Annotated[int | None, Field(ge=784, le=10_000_000_000)] = None
    """Most pixels of each frame of a video; with Qwen3-VL, of all frames of a video together."""
    video_fps: Annotated[float | None, Field(gt=0, le=240)] = None
    """Frames per second that are taken of a video. By default the processor's, or 2."""
    video_max_frames: Annotated[int | None, Field(ge=2, le=65536)] = None
    """Most frames that are taken of a video; of a longer one they lie further apart. By default the processor's, as a rule 768."""


class Dataset(Model):
    """The rows, and how they become sequences of tokens."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.validationSplit) || !has(self.validation) || self.validation.size() == 0",
                "leave it out when validation is given: the rows come from one of them",
                field_path=".validationSplit",
            ),
            Rule(
                "!has(self.multimodal) || !has(self.streaming)",
                "leave it out with streaming: rows that are streamed show no images or videos",
                field_path=".multimodal",
            ),
            Rule(
                "!has(self.interleave) || !has(self.interleave.weights) || self.interleave.weights.size() == 0 || "
                "(has(self.train) && self.interleave.weights.size() == self.train.size())",
                "give one weight for each part of train, or none at all",
                field_path=".interleave.weights",
            ),
        )
    )

    train: DataParts = Field(default_factory=list)
    """Rows to learn from, all parts together. Needed unless training.maxSteps is 0."""
    validation: DataParts = Field(default_factory=list)
    """Rows to evaluate on."""
    validation_split: Annotated[float | None, Field(gt=0, le=0.5)] = None
    """Fraction of the training rows that is set aside for evaluation."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest sequence, in tokens."""
    truncation: Literal["auto", "delete", "left", "right", "split"] = "auto"
    """What becomes of a longer row: dropped and counted (delete), cut at one end, or cut into several (split, pretrain only). auto is split for pretrain, else delete."""
    loss: Literal["auto", "all", "assistant", "lastTurn", "lastRound"] = "auto"
    """Tokens that are learnt: every one, the assistant's answers, the last answer, or the answers and tool calls after the last question (lastRound). auto is all for pretrain, else assistant. A message's own loss and weight go before it."""
    tool_call_weight: Annotated[float, Field(ge=0, le=1000)] = 1
    """Weight of tool calls in the loss; 1 counts them as any other answer, 0 leaves them out."""
    ignore_empty_think: bool = False
    """Learn nothing of the empty <think></think> that an answer without thoughts begins with."""
    packing: Packing | None = None
    """Pack short rows together: many times the rows per second where most are much shorter than maxLength. A row of a batch is a pack then. Validation rows stay as they are."""
    padding_free: bool = False
    """Join the rows of each batch into one without padding, each with attention to itself alone. Worth it with flash attention."""
    strict: bool = True
    """A broken row ends the job before it starts. false passes broken rows over, counts them, and says what was wrong with the first."""
    streaming: Streaming | None = None
    """Read rows while the training runs. Needs training.maxSteps. Each process takes every n-th row, and a run that goes on does so with the next one. Object storage must hold .jsonl, .ndjson or .txt."""
    interleave: Interleave | None = None
    """Mix the parts of train by weight."""
    cache: Literal["job", "namespace"] = "job"
    """Where tokenised rows are kept, so that one pod tokenises for all, and once for all attempts: below the job's own prefix, or for every job of the namespace that writes to the same output.uri. Rows are found by what they are made of, and nothing deletes them."""
    multimodal: Multimodal | None = None
    """How images and videos of rows are prepared."""
    shuffle: bool = True
    """Shuffle the rows, anew each epoch."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Seed of sampling, splitting and shuffling."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that tokenise."""


class Template(Model):
    """How a conversation becomes text. What is decided here is baked into the artifact."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            Rule(
                "!has(self.name) || !has(self.chatTemplate)",
                "leave it out when chatTemplate is given: one of them is the template",
                field_path=".name",
            )
        )
    )

    name: Literal["chatml", "llama3", "llama3.1", "qwen2.5", "qwen3", "gemma", "gemma3"] | None = None
    """A family's published chat template to use in place of the model's own: chatml makes most bases chat. Its turn marks must be tokens of the vocabulary; model.newTokens adds them."""
    chat_template: Annotated[str | None, Field(min_length=1, max_length=65536)] = None
    """Jinja chat template to use in place of the model's own."""
    enable_thinking: bool | None = None
    """What the template is told of thinking where nobody says: true or false for templates that know enable_thinking, such as Qwen3's. A row's chat_template_kwargs and a client's request go before it."""
    system: Annotated[str | None, Field(max_length=16384)] = None
    """System prompt of conversations that bring none."""
    stop_tokens: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=64)]],
        Field(max_length=8, json_schema_extra=LIST_ATOMIC),
    ] = Field(default_factory=list)
    """Further tokens that end an answer; each must be one token of the vocabulary."""
