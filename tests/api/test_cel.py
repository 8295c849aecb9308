"""What the API server refuses by itself, with the field's path and the sentence that a user reads.

Three nets: a row for every rule; a violation of every bound of every field, derived from the kinds and the examples;
and what a started job lets nobody change.
"""
# ruff: noqa: E501 - a row of a table is one line

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab_api.names import NAME_LIMIT
from trimtab_api.schema import RULES_KEY
from trimtab_api.v1alpha1 import RESOURCES
from trimtab_operator.crdgen import crd

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMAS = {resource.kind: crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for resource in RESOURCES}
PLURALS = {resource.kind: resource.plural for resource in RESOURCES}

HUB = {"huggingFace": {"repo": "acme/tiny"}}
MINIMAL: dict[str, dict[str, Any]] = {
    "FineTuneJob": {"method": "sft", "model": {"from": HUB}, "dataset": {"train": [{"from": {"inline": "{}"}}]}},
    "MergeJob": {"adapters": [{"from": HUB}]},
    "ModelDeployment": {"model": {"from": HUB}},
}
SCRATCH = {
    "modelType": "llama", "hiddenSize": 128, "layers": 2, "attentionHeads": 4, "tokenizer": {"train": {}},
}  # fmt: skip
GRPO = {"rewards": [{"name": "format"}]}
PPO = {"rewardModel": {"from": HUB}}
GKD = {"teacher": {"from": HUB}}
BESIDE: dict[str, Any] = {"method": "grpo", "grpo": GRPO, "rollout": {"engine": "vllm"}}
"""Answers that an engine beside the trainer draws."""
GONE = object()
"""In a row: the field is removed."""
ASKED = {"training.maxSteps": 0, "evaluation": {}, "dataset": {"validation": [{"from": {"inline": "{}"}}]}}
"""A job that learns nothing, and answers."""


def build(kind: str, changes: dict[str, Any], name: str = "job") -> dict[str, Any]:
    """The smallest object of a kind with some fields set: {"model.from": ..., "dataset.train.0.format": ...}."""
    spec: dict[str, Any] = copy.deepcopy(MINIMAL[kind])
    for path, value in changes.items():
        *parents, last = path.split(".")
        node: Any = spec
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if value is GONE:
            del node[last]
        elif isinstance(node, list):
            node[int(last) : int(last) + 1] = [value]
        else:
            node[last] = copy.deepcopy(value)
    return {"apiVersion": "trimtab.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def refused(answer: Any, field: str, part: str) -> None:
    """Assert that the server refused and said this about this field."""
    assert not answer.accepted, "it was accepted"
    hits = [message for where, message in answer.causes if where == field]
    assert any(part in message for message in hits), f"wanted {field}: {part}; got {answer.status} {answer.message}"


@dataclass(frozen=True)
class Row:
    """What is set, which field the server must name, and part of what it must say."""

    name: str
    kind: str
    changes: dict[str, Any]
    field: str
    part: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}".replace(" ", "-")


F, M, D = "FineTuneJob", "MergeJob", "ModelDeployment"
EXACTLY_ONE_MODEL = "give exactly one of s3, huggingFace, volume, fineTuneJob, mergeJob"
EXACTLY_ONE_DATA = "give exactly one of s3, huggingFace, volume, inline"
TWO = {**HUB, "fineTuneJob": {"name": "base"}}
PLACE = "s3://models/a"

REFUSED = (
    # Sources
    Row("no model", F, {"model": {}}, "spec.model", "exactly one of from (an existing model) and scratch"),
    Row("model and scratch", F, {"model.scratch": SCRATCH}, "spec.model", "exactly one of from"),
    Row("empty source", F, {"model.from": {}}, "spec.model.from", EXACTLY_ONE_MODEL),
    Row("two sources", F, {"model.from": TWO}, "spec.model.from", EXACTLY_ONE_MODEL),
    Row("data from nowhere", F, {"dataset.train.0.from": {}}, "spec.dataset.train[0].from", EXACTLY_ONE_DATA),
    Row("data from two places", F, {"dataset.train.0.from": {"inline": "{}", "s3": {"uri": PLACE}}}, "spec.dataset.train[0].from", EXACTLY_ONE_DATA),
    Row("validation from nowhere", F, {"dataset.validation": [{"from": {}}]}, "spec.dataset.validation[0].from", EXACTLY_ONE_DATA),
    Row("adapter from two places", M, {"adapters.0.from": TWO}, "spec.adapters[0].from", EXACTLY_ONE_MODEL),
    Row("base from nowhere", M, {"base": {}}, "spec.base", EXACTLY_ONE_MODEL),
    Row("model from two places", D, {"model.from": TWO}, "spec.model.from", EXACTLY_ONE_MODEL),
    Row("adapter from nowhere", D, {"adapters": [{"name": "a", "from": {}}]}, "spec.adapters[0].from", EXACTLY_ONE_MODEL),
    Row("no tokenizer source", F, {"model": {"scratch": {**SCRATCH, "tokenizer": {}}}}, "spec.model.scratch.tokenizer", "give exactly one of from, train"),
    Row("two tokenizer sources", F, {"model": {"scratch": {**SCRATCH, "tokenizer": {"train": {}, "from": HUB}}}}, "spec.model.scratch.tokenizer", "give exactly one of from, train"),
    Row("images from two places", F, {"dataset.train.0.mediaFrom": {"s3": {"uri": PLACE}, "volume": {"claimName": "c"}}}, "spec.dataset.train[0].mediaFrom", "give exactly one of s3, volume"),
    # Places
    Row("uri without bucket", F, {"output.uri": "s3://"}, "spec.output.uri", "must be s3://BUCKET/KEY, for example"),
    Row("uri with an empty bucket", F, {"model.from": {"s3": {"uri": "s3:///key"}}}, "spec.model.from.s3.uri", "must be s3://BUCKET/KEY"),
    Row("uri of another scheme", F, {"dataset.train.0.from": {"s3": {"uri": "gs://bucket/key"}}}, "spec.dataset.train[0].from.s3.uri", "must be s3://BUCKET/KEY"),
    Row("uri with a capital bucket", M, {"output.uri": "s3://Models/x"}, "spec.output.uri", "must be s3://BUCKET/KEY"),
    Row("path out of the volume", F, {"model.from": {"volume": {"claimName": "c", "path": "a/../../b"}}}, "spec.model.from.volume.path", "no leading slash, no '..'"),
    Row("absolute path in the volume", D, {"model.from": {"volume": {"claimName": "c", "path": "/a"}}}, "spec.model.from.volume.path", "no leading slash, no '..'"),
    Row("endpoint without scheme", F, {"storage.endpoint": "minio:9000"}, "spec.storage.endpoint", "must be http://HOST:PORT"),
    Row("endpoint with keys", F, {"storage.endpoint": "https://key:secret@minio:9000"}, "spec.storage.endpoint", "keys belong into the Secret"),
    Row("endpoint with a path", M, {"storage.endpoint": "https://minio/bucket"}, "spec.storage.endpoint", "must be http://HOST:PORT"),
    Row("anonymous with keys", F, {"storage": {"anonymous": True, "credentials": {"secretName": "s"}}}, "spec.storage.credentials", "unsigned requests use no keys"),
    # Trackers
    Row("tracker without scheme", F, {"reports.mlflow": {"server": "mlflow:5000", "experiment": "e"}}, "spec.reports.mlflow.server", "must be http://HOST:PORT"),
    Row("tracker with keys", F, {"reports.mlflow": {"server": "https://me:word@mlflow", "experiment": "e"}}, "spec.reports.mlflow.server", "keys belong into the Secret"),
    # A model from scratch
    Row("scratch with lora", F, {"model": {"scratch": SCRATCH}, "tuner.type": "lora"}, "spec.tuner.type", "must be full, or left out"),
    Row("scratch with lora fields", F, {"model": {"scratch": SCRATCH}, "tuner.lora": {}}, "spec.tuner.lora", "remove it: random weights have no base"),
    Row("heads that do not divide", F, {"model": {"scratch": {**SCRATCH, "attentionHeads": 3}}}, "spec.model.scratch.hiddenSize", "must be a multiple of attentionHeads"),
    Row("key heads that do not divide", F, {"model": {"scratch": {**SCRATCH, "keyValueHeads": 3}}}, "spec.model.scratch.keyValueHeads", "must divide attentionHeads"),
    Row("rows longer than the model", F, {"model": {"scratch": {**SCRATCH, "maxLength": 128}}}, "spec.dataset.maxLength", "must not exceed model.scratch.maxLength"),
    # Tuning
    Row("lora fields with full", F, {"tuner": {"type": "full", "lora": {"rank": 4}}}, "spec.tuner.lora", "remove it, or set type: lora"),
    Row("regex and names", F, {"tuner.lora": {"targetRegex": "q", "targetModules": ["q"]}}, "spec.tuner.lora.targetRegex", "leave it out when targetModules is given"),
    # The optimisation
    Row("stopping on nothing", F, {"training.earlyStopping": {"patience": 2}}, "spec.training.earlyStopping", "needs validation rows"),
    Row("evaluating nothing", F, {"training.evaluateAtStart": True}, "spec.training.evaluateAtStart", "needs rows to validate on"),
    Row("answers to nothing", F, {"evaluation": {}}, "spec.evaluation", "needs rows to answer"),
    *(
        Row(f"answers of a {method}", F, {"evaluation": {}, "dataset.validationSplit": 0.1, **more, "method": method}, "spec.evaluation", "gives numbers and writes no answers")
        for method, more in (("rewardModel", {}), ("reranker", {}), ("embedding", {"training.perDeviceBatchSize": 2}), ("sequenceClassification", {"classification": {"numLabels": 2}}))
    ),
    Row("a metric twice", F, {"evaluation": {"metrics": ["bleu", "rouge", "bleu"]}, "dataset.validationSplit": 0.1}, "spec.evaluation.metrics", "names a metric twice"),
    *(
        Row(f"nothing learnt with {name}", F, {**ASKED, **changes}, f"spec.{field}", part)
        for name, changes, field, part in (
            ("a start", {"evaluation": {"atStart": True}}, "evaluation.atStart", "the model that begins is the one that ends"),
            ("another method", {"method": "dpo"}, "method", "must be sft with training.maxSteps: 0"),
            ("random weights", {"model": {"scratch": SCRATCH}}, "model.scratch", "random weights have no answers"),
            ("new tokens", {"model.newTokens": ["<|a|>"]}, "model.newTokens", "nobody teaches the model new tokens"),
            ("four bits alone", {"model.quantization": {"method": "bnb4"}}, "model.quantization", "name an adapter in tuner.continueFrom"),
            ("split weights", {"distributed.strategy": "fsdp2"}, "distributed.strategy", "the others split weights for their optimiser"),
            ("a stream", {"dataset.streaming": {}}, "dataset.streaming", "no row is read to learn from"),
            ("a loss", {"training.evaluateAtStart": True}, "training", "no loss is measured"),
        )
    ),
    Row("nothing learnt and nothing asked", F, {"training.maxSteps": 0}, "spec.evaluation", "give evaluation: {} with training.maxSteps: 0"),
    Row("nothing to learn from", F, {"dataset": {"validation": [{"from": {"inline": "{}"}}]}, "evaluation": {}}, "spec.dataset.train", "give rows to learn from"),
    Row("a split of nothing", F, {**ASKED, "dataset": {"validationSplit": 0.1}}, "spec.dataset.validationSplit", "give the rows to split in dataset.train"),
    Row("part of the likeliest token", F, {"evaluation": {"generate": {"topP": 0.9}}, "dataset.validationSplit": 0.1}, "spec.evaluation.generate.topP", "at temperature 0 the likeliest token is taken"),
    Row("noise for preferences", F, {"method": "dpo", "training.neftuneAlpha": 5}, "spec.training.neftuneAlpha", "noise on the embeddings is for pretrain and sft"),
    Row("lengths without an order", F, {"training.groupByLength": True, "dataset.shuffle": False}, "spec.training.groupByLength", "elsewhere the order of rows has a meaning"),
    # Tuners
    Row("biases for preferences", F, {"method": "dpo", "tuner.lora": {"bias": "all"}}, "spec.tuner.lora.bias", "must be none but for pretrain and sft"),
    Row("dropout of parameters", F, {"tuner.lora": {"targetParameters": ["experts.up"], "dropout": 0.1}}, "spec.tuner.lora.dropout", "parameters that are no layer of their own take no dropout"),
    Row("dora of parameters", F, {"tuner.lora": {"targetParameters": ["experts.up"], "dora": True}}, "spec.tuner.lora.dora", "only whole layers have a direction"),
    Row("dora of a weight taken apart", F, {"tuner.lora": {"dora": True, "initWeights": "pissa"}}, "spec.tuner.lora.dora", "a weight that was taken apart has no size"),
    Row("parameters taken apart", F, {"tuner.lora": {"targetParameters": ["experts.up"], "initWeights": "olora"}}, "spec.tuner.lora.initWeights", "only the weights of whole layers are taken apart"),
    Row("a start of too large a rank", F, {"tuner.lora": {"initWeights": "pissa_niter_4", "rank": 300}}, "spec.tuner.lora.rank", "published with twice the rank"),
    Row("layers and ratio", F, {"tuner": {"type": "full", "freeze": {"layers": 1, "ratio": 0.5}}}, "spec.tuner.freeze.ratio", "leave it out when layers is given"),
    Row("freeze beside an adapter", F, {"tuner.freeze": {"layers": 1}}, "spec.tuner.freeze", "beside an adapter the whole base is frozen"),
    Row("full tuning of an adapter", F, {"tuner": {"type": "full", "continueFrom": HUB}}, "spec.tuner.continueFrom", "remove it, or set type: lora: full tuning has no adapter"),
    Row("full tuning on adapters", F, {"tuner": {"type": "full", "adapters": [{"from": HUB}]}}, "spec.tuner.adapters", "to tune the sum in full, merge the adapters first"),
    Row("an adapter that goes on otherwise", F, {"tuner": {"continueFrom": HUB, "lora": {"rank": 4}}}, "spec.tuner.lora", "keeps its own rank"),
    Row("an adapter that goes on upon others", F, {"tuner": {"continueFrom": HUB, "adapters": [{"from": HUB}]}}, "spec.tuner.adapters", "remove one of adapters and continueFrom"),
    Row("new tokens for an adapter that goes on", F, {"tuner.continueFrom": HUB, "model.newTokens": ["<|a|>"]}, "spec.model.newTokens", "has no room for further tokens"),
    Row("new tokens from scratch", F, {"model": {"scratch": SCRATCH, "newTokens": ["<|a|>"]}}, "spec.model.newTokens", "the tokenizer of a model from scratch"),
    Row("scratch that is frozen", F, {"model": {"scratch": SCRATCH}, "tuner": {"type": "full", "freeze": {"layers": 1}}}, "spec.tuner.freeze", "random weights that never move"),
    Row("scratch with an adapter that goes on", F, {"model": {"scratch": SCRATCH}, "tuner.continueFrom": HUB}, "spec.tuner.continueFrom", "no adapter was trained on random weights"),
    Row("scratch on adapters", F, {"model": {"scratch": SCRATCH}, "tuner.adapters": [{"from": HUB}]}, "spec.tuner.adapters", "no adapters were trained on random weights"),
    Row("split for sft", F, {"dataset.truncation": "split"}, "spec.dataset.truncation", "choose delete, left or right"),
    Row("wrapped for sft", F, {"dataset.packing": {"strategy": "wrapped"}}, "spec.dataset.packing.strategy", "must be bfd: the others cut answers"),
    Row("packs shorter than a row", F, {"dataset": {"train": [{"from": {"inline": "{}"}}], "maxLength": 512, "packing": {"length": 256}}}, "spec.dataset.packing.length", "must be at least dataset.maxLength"),
    Row("pairs without padding", F, {"method": "dpo", "dataset.paddingFree": True}, "spec.dataset.paddingFree", "the other methods compare rows"),
    Row("thoughts of pairs", F, {"method": "dpo", "dataset.ignoreEmptyThink": True}, "spec.dataset.ignoreEmptyThink", "the other methods judge whole answers"),
    Row("stream of pairs", F, {"method": "dpo", "dataset.streaming": {}, "training.maxSteps": 1}, "spec.dataset.streaming", "read their rows before the training"),
    Row("two templates", F, {"template": {"name": "chatml", "chatTemplate": "{{ messages }}"}}, "spec.template.name", "leave it out when chatTemplate is given"),
    Row("stream without an end", F, {"dataset.streaming": {}}, "spec.training.maxSteps", "nobody knows how many rows a stream has"),
    Row("split of a stream", F, {"dataset.streaming": {}, "training.maxSteps": 1, "dataset.validationSplit": 0.1}, "spec.dataset.validationSplit", "give dataset.validation rows of their own"),
    Row("packs of a stream", F, {"dataset.streaming": {}, "training.maxSteps": 1, "dataset.packing": {}}, "spec.dataset.packing", "packs are made of rows that are all there"),
    Row("pictures of a stream", F, {"dataset.streaming": {}, "training.maxSteps": 1, "dataset.multimodal": {"videoFps": 1}}, "spec.dataset.multimodal", "rows that are streamed show no images or videos"),
    Row("films where text is read", F, {"method": "embedding", "dataset.multimodal": {"videoFps": 1}}, "spec.dataset.multimodal", "reads text alone"),
    Row("like lengths of a stream", F, {"dataset.streaming": {}, "training": {"maxSteps": 1, "groupByLength": True}}, "spec.training.groupByLength", "must be false with dataset.streaming"),
    Row("sample of a stream", F, {"dataset.streaming": {}, "training.maxSteps": 1, "dataset.train.0.sample": 5}, "spec.dataset.train", "leave out sample with dataset.streaming"),
    Row("tokenizer of a stream", F, {"dataset.streaming": {}, "training.maxSteps": 1, "model": {"scratch": SCRATCH}}, "spec.model.scratch.tokenizer.train", "a tokenizer is learnt from rows that are all there"),
    Row("weights for other parts", F, {"dataset.interleave": {"weights": [1, 2]}}, "spec.dataset.interleave.weights", "give one weight for each part of train"),
    Row("two sources of validation", F, {"dataset.validation": [{"from": {"inline": "{}"}}], "dataset.validationSplit": 0.1}, "spec.dataset.validationSplit", "leave it out when validation is given"),
    Row("floor without cosine", F, {"training.scheduler": {"type": "linear", "minLearningRate": 1e-6}}, "spec.training.scheduler.minLearningRate", "set type: cosine"),
    Row("floor above the peak", F, {"training": {"learningRate": 1e-5, "scheduler": {"minLearningRate": 1e-4}}}, "spec.training.scheduler.minLearningRate", "must not exceed learningRate"),
    # Preferences
    *(Row(f"{block} of another method", F, {block: {}}, f"spec.{block}", f"set method: {block}") for block in ("dpo", "kto", "cpo", "simpo", "orpo")),
    Row("scratch with dpo", F, {"method": "dpo", "model": {"scratch": SCRATCH}}, "spec.model.scratch", "tune with sft first"),
    Row("dpo of every token", F, {"method": "dpo", "dataset.loss": "all"}, "spec.dataset.loss", "choose auto, assistant or lastTurn"),
    Row("dpo of weighted calls", F, {"method": "dpo", "dataset.toolCallWeight": 2}, "spec.dataset.toolCallWeight", "preferences compare whole answers"),
    Row("dpo of packed rows", F, {"method": "dpo", "dataset.packing": {}}, "spec.dataset.packing", "only pretrain and sft"),
    Row("dpo with new tokens", F, {"method": "dpo", "model.newTokens": ["<x>"]}, "spec.model.newTokens", "the reference does not know them"),
    Row("kto of single rows", F, {"method": "kto"}, "spec.training.perDeviceBatchSize", "must be at least 2 with kto"),
    Row("weights too few", F, {"method": "dpo", "dpo": {"lossType": ["sigmoid", "hinge"], "lossWeights": [1]}}, "spec.dpo.lossWeights", "must have one weight for each"),
    Row("a loss twice", F, {"method": "dpo", "dpo.lossType": ["ipo", "ipo"]}, "spec.dpo.lossType", "names a loss twice"),
    Row("sft alone", F, {"method": "dpo", "dpo.lossType": ["sft"]}, "spec.dpo.lossType", "sft alone compares nothing"),
    Row("sft twice over", F, {"method": "dpo", "dpo": {"lossType": ["ipo", "sft"], "rpoAlpha": 1}}, "spec.dpo.rpoAlpha", "leave it out"),
    Row("smoothing that is not looked at", F, {"method": "dpo", "dpo.labelSmoothing": 0.1}, "spec.dpo.labelSmoothing", "must be 0, or dpo.lossType one of"),
    Row("smoothing that is missing", F, {"method": "dpo", "dpo.lossType": ["exoPair"]}, "spec.dpo.labelSmoothing", "must be above 0 with exoPair"),
    Row("aot of single rows", F, {"method": "dpo", "dpo.lossType": ["aot"]}, "spec.training.perDeviceBatchSize", "must be at least 2 with aot"),
    Row("precomputed on two nodes", F, {"method": "dpo", "dpo.precomputeRefLogProbs": True, "distributed.nodes": 2}, "spec.dpo.precomputeRefLogProbs", "must be false with several nodes"),
    # What the model says
    Row("grpo without rewards", F, {"method": "grpo"}, "spec.grpo", "give grpo.rewards"),
    Row("grpo for sft", F, {"grpo": GRPO}, "spec.grpo", "remove it, or set method: grpo"),
    Row("ppo without a reward", F, {"method": "ppo"}, "spec.ppo", "give ppo.rewardModel"),
    Row("ppo for sft", F, {"ppo": PPO}, "spec.ppo", "remove it, or set method: ppo"),
    Row("gkd without a teacher", F, {"method": "gkd"}, "spec.gkd", "give gkd.teacher"),
    Row("gkd for sft", F, {"gkd": GKD}, "spec.gkd", "remove it, or set method: gkd"),
    Row("grpo from scratch", F, {"method": "grpo", "grpo": GRPO, "model": {"scratch": SCRATCH}}, "spec.model.scratch", "random weights say nothing"),
    Row("prompts cut at their end", F, {"method": "ppo", "ppo": PPO, "dataset.truncation": "right"}, "spec.dataset.truncation", "must be delete or left"),
    Row("grpo with new tokens", F, {"method": "grpo", "grpo": GRPO, "model.newTokens": ["<x>"]}, "spec.model.newTokens", "the model as it was, or the teacher"),
    Row("parts of answers", F, {"method": "gkd", "gkd": GKD, "dataset.loss": "lastTurn"}, "spec.dataset.loss", "whole answers are learnt from"),
    Row("two rewards in one", F, {"method": "grpo", "grpo": {"rewards": [{"name": "format", "rewardModel": {"from": HUB}}]}}, "spec.grpo.rewards[0]", "give exactly one of name, rewardModel, python"),
    Row("ratios of answers in a sum of tokens", F, {"method": "grpo", "grpo": {**GRPO, "importanceSampling": "sequence", "lossType": "dapo"}}, "spec.grpo.lossType", "must be grpo with importanceSampling: sequence"),
    Row("a part of a group", F, {"method": "grpo", "grpo": GRPO, "training.gradientAccumulationSteps": 3, "distributed.processesPerNode": 2}, "spec.grpo.numGenerations", "whole groups of answers"),
    Row("an adapted head", F, {"tuner.lora": {"targetModules": ["q_proj", "lm_head"]}}, "spec.tuner.lora.targetModules", "leave lm_head out"),
    Row("an adapted head that is rewarded", F, {"method": "grpo", "grpo": GRPO, "tuner.lora": {"targetModules": ["q_proj", "lm_head"]}}, "spec.tuner.lora.targetModules", "leave lm_head out"),
    # Processes that work at one row
    Row("shared sequences of scratch", F, {"method": "pretrain", "model": {"scratch": {**SCRATCH, "attentionHeads": 4}}, "distributed": {"nodes": 3, "parallel": {"sequence": 3}}}, "spec.distributed.parallel.sequence", "must divide model.scratch.attentionHeads"),
    Row("shared sequences that are compared", F, {"method": "dpo", "distributed.parallel": {"sequence": 2}}, "spec.distributed.parallel.sequence", "must be 1, or method sft or pretrain"),
    Row("shared sequences in packs", F, {"dataset.packing": {}, "distributed.parallel": {"sequence": 2}}, "spec.distributed.parallel.sequence", "the mask that keeps documents apart"),
    Row("shared sequences of one process", F, {"distributed": {"strategy": "deviceMap", "parallel": {"sequence": 2}}}, "spec.distributed.parallel.sequence", "where there is one process"),
    Row("sequences shared by a half", F, {"distributed": {"nodes": 1, "processesPerNode": 3, "parallel": {"sequence": 2}}}, "spec.distributed.parallel.sequence", "must divide distributed.nodes x distributed.processesPerNode"),
    Row("noise on shared sequences", F, {"training.neftuneAlpha": 5, "distributed.parallel": {"sequence": 2}}, "spec.distributed.parallel.sequence", "the length of a whole sequence"),
    Row("answers to shared sequences", F, {"dataset": {"validation": [{"from": {"inline": "{}"}}]}, "training.maxSteps": 0, "evaluation": {}, "distributed.parallel": {"sequence": 2}}, "spec.distributed.parallel.sequence", "answers are drawn from whole prompts"),
    Row("context parallel", F, {"distributed.parallel": {"context": 2}}, "spec.distributed.parallel.context", "must be 1: the ring attention"),
    Row("shared layers of an adapter", F, {"distributed.parallel": {"tensor": 2}}, "spec.distributed.parallel.tensor", "must be 1, or tuner.type be full"),
    Row("shared experts of an adapter", F, {"distributed.parallel": {"expert": 2}}, "spec.distributed.parallel.expert", "must be 1, or tuner.type be full"),
    Row("shared layers that are split", F, {"tuner": {"type": "full"}, "distributed": {"strategy": "zero3", "parallel": {"tensor": 2}}}, "spec.distributed.parallel.tensor", "must be 1, or strategy auto"),
    Row("shared layers that are compared", F, {"method": "dpo", "tuner": {"type": "full"}, "distributed.parallel": {"tensor": 2}}, "spec.distributed.parallel.tensor", "method sft or pretrain"),
    Row("shared layers and sequences", F, {"tuner": {"type": "full"}, "distributed.parallel": {"tensor": 2, "sequence": 2}}, "spec.distributed.parallel.tensor", "must be 1, or sequence be 1"),
    Row("shared layers and experts", F, {"tuner": {"type": "full"}, "distributed.parallel": {"tensor": 2, "expert": 2}}, "spec.distributed.parallel.expert", "must be 1, or tensor be 1"),
    Row("layers shared by some", F, {"tuner": {"type": "full"}, "distributed": {"nodes": 2, "processesPerNode": 2, "parallel": {"tensor": 2}}}, "spec.distributed.parallel.tensor", "all processes share each layer"),
    Row("shared layers that answer", F, {"dataset": {"train": [{"from": {"inline": "{}"}}], "validation": [{"from": {"inline": "{}"}}]}, "evaluation": {}, "tuner": {"type": "full"}, "distributed.parallel": {"tensor": 2}}, "spec.distributed.parallel.tensor", "leave out evaluation"),
    # Who draws the answers
    Row("an engine for rows", F, {"rollout": {}}, "spec.rollout", "the others learn from rows"),
    Row("a container that is not", F, {"method": "grpo", "grpo": GRPO, "rollout.resources": {"limits": {"cpu": 1}}}, "spec.rollout.resources", "there is no container but the trainer's"),
    Row("an engine for directions", F, {**BESIDE, "tuner.lora": {"dora": True}}, "spec.tuner.lora", "takes plain adapters alone"),
    Row("an engine for whole modules", F, {**BESIDE, "tuner.lora": {"modulesToSave": ["head"]}}, "spec.tuner.lora", "takes plain adapters alone"),
    Row("an engine for parameters", F, {**BESIDE, "tuner.lora": {"targetParameters": ["a"]}}, "spec.tuner.lora", "takes plain adapters alone"),
    Row("an engine for embeddings", F, {**BESIDE, "tuner.lora": {"targetModules": ["q_proj", "embed_tokens"]}}, "spec.tuner.lora.targetModules", "adapters of the layers between them"),
    Row("an engine for another base", F, {**BESIDE, "tuner.lora": {"initWeights": "pissa"}}, "spec.tuner.lora.initWeights", "which has the base as it was"),
    Row("an engine for a sum", F, {**BESIDE, "tuner.adapters": [{"from": HUB}]}, "spec.tuner.adapters", "merge these adapters first"),
    Row("an engine for four bits", F, {**BESIDE, "model.quantization": {"method": "bnb4"}}, "spec.model.quantization", "before they were quantised"),
    # Models that answer with numbers
    Row("reward knobs for sft", F, {"rewardModel": {}}, "spec.rewardModel", "set method: rewardModel: these are that method's knobs"),
    Row("labels for sft", F, {"classification": {"numLabels": 2}}, "spec.classification", "set method: sequenceClassification: these are that method's knobs"),
    Row("embedding knobs for a reranker", F, {"method": "reranker", "embedding": {}}, "spec.embedding", "set method: embedding: these are that method's knobs"),
    Row("reranker knobs for sft", F, {"reranker": {}}, "spec.reranker", "set method: reranker: these are that method's knobs"),
    Row("classifier without labels", F, {"method": "sequenceClassification"}, "spec.classification", "method sequenceClassification needs it"),
    Row("classifier without a number of labels", F, {"method": "sequenceClassification", "classification": {"problemType": "multiLabel"}}, "spec.classification.numLabels", "give numLabels, or labels by name, unless problemType is regression"),
    Row("other number of labels", F, {"method": "sequenceClassification", "classification": {"numLabels": 3, "labels": ["a", "b"]}}, "spec.classification.numLabels", "must be the number of labels, or left out"),
    Row("classifier of one label", F, {"method": "sequenceClassification", "classification": {"numLabels": 1}}, "spec.classification.numLabels", "must be at least 2 with singleLabel"),
    Row("classifier of one name", F, {"method": "sequenceClassification", "classification": {"labels": ["a"]}}, "spec.classification.labels", "must be at least 2 with singleLabel"),
    Row("label twice", F, {"method": "sequenceClassification", "classification": {"labels": ["a", "a"]}}, "spec.classification.labels[1]", "Duplicate value"),
    Row("token loss for a reward", F, {"method": "rewardModel", "dataset.loss": "lastTurn"}, "spec.dataset.loss", "learns from whole rows, not from single tokens"),
    Row("tool weights for a reward", F, {"method": "rewardModel", "dataset.toolCallWeight": 2}, "spec.dataset", "leave toolCallWeight and ignoreEmptyThink out"),
    Row("embedder cut from the left", F, {"method": "embedding", "dataset.truncation": "left", "training.perDeviceBatchSize": 4}, "spec.dataset.truncation", "must be right or delete: whoever uses an embedder cuts texts at their end"),
    Row("embedder of single rows", F, {"method": "embedding"}, "spec.training.perDeviceBatchSize", "must be at least 2: the other texts of the batch"),
    Row("mining in single rows", F, {"method": "embedding", "embedding": {"loss": "onlineContrastive"}}, "spec.training.perDeviceBatchSize", "must be at least 2: the other texts of the batch"),
    Row("negatives without infonce", F, {"method": "embedding", "embedding": {"loss": "contrastive", "hardNegatives": 1}}, "spec.embedding.hardNegatives", "only infonce holds an anchor against several texts"),
    Row("temperature without infonce", F, {"method": "embedding", "embedding": {"loss": "contrastive", "temperature": 1}}, "spec.embedding.temperature", "only infonce has one"),
    Row("margin with infonce", F, {"method": "embedding", "embedding": {"margin": 1}}, "spec.embedding.margin", "set loss: contrastive or onlineContrastive"),
    Row("temperature of single documents", F, {"method": "reranker", "reranker": {"temperature": 1}}, "spec.reranker.temperature", "leave it out, or set loss: listwise"),
    # Pods
    Row("quantised weights in full", F, {"model.quantization": {"method": "bnb4"}, "tuner.type": "full"}, "spec.model.quantization", "set tuner.type: lora"),
    Row("quantised random weights", F, {"model": {"scratch": SCRATCH, "quantization": {"method": "bnb4"}}}, "spec.model.quantization", "random weights are all trained"),
    Row("eight bits that are split", F, {"model.quantization": {"method": "bnb8"}, "distributed.strategy": "fsdp2"}, "spec.model.quantization.method", "choose method bnb4, or strategy ddp, zero1 or zero2"),
    Row("bytes that are split", F, {"model.quantization": {"method": "bnb4", "storageDtype": "uint8"}, "distributed.strategy": "zero3"}, "spec.model.quantization.storageDtype", "stored as bfloat16"),
    Row("quantised weights that would be converted", F, {"model.dtype": "float16", "model.quantization": {"method": "bnb4"}, "distributed.strategy": "zero3"}, "spec.model.dtype", "choose bfloat16 or float32"),
    Row("adapters in quantised weights", F, {"model.quantization": {"method": "bnb4"}, "tuner.adapters": [{"from": HUB}]}, "spec.tuner.adapters", "quantised weights take no other adapter in"),
    Row("a start out of quantised weights", F, {"model.quantization": {"method": "bnb4"}, "tuner.lora.initWeights": "pissa"}, "spec.tuner.lora.initWeights", "quantised weights give nothing out"),
    Row("a map over nodes", F, {"distributed": {"strategy": "deviceMap", "nodes": 2}}, "spec.distributed.nodes", "must be 1 with strategy deviceMap"),
    Row("a map for many processes", F, {"distributed": {"strategy": "deviceMap", "processesPerNode": 2}}, "spec.distributed.processesPerNode", "one process uses the devices of its pod"),
    Row("an optimiser offloaded by ddp", F, {"distributed": {"strategy": "ddp", "offload": {"optimizer": True}}}, "spec.distributed.offload.optimizer", "needs strategy zero1, zero2 or zero3"),
    Row("weights offloaded by zero2", F, {"distributed": {"strategy": "zero2", "offload": {"parameters": True}}}, "spec.distributed.offload.parameters", "needs strategy zero3 or fsdp2"),
    Row("adapters in split weights", F, {"distributed.strategy": "fsdp2", "tuner.adapters": [{"from": HUB}]}, "spec.tuner.adapters", "weights that are split take no other adapter in"),
    Row("a start out of split weights", F, {"distributed.strategy": "zero3", "tuner.lora.initWeights": "olora"}, "spec.tuner.lora.initWeights", "weights that are split give nothing out"),
    Row("new rows in split weights", F, {"distributed.strategy": "zero3", "model.newTokens": ["<a>"], "tuner.type": "full"}, "spec.model.newTokens", "choose ddp, zero1 or zero2"),
    Row("another optimiser that is split", F, {"distributed.strategy": "zero2", "training.optimizer": "adafactor"}, "spec.training.optimizer", "must be adamw, or choose ddp"),
    Row("pure bf16 for an adapter", F, {"training.pureBf16": True}, "spec.training.pureBf16", "needs tuner.type: full"),
    Row("pure bf16 in float32", F, {"training.pureBf16": True, "tuner.type": "full", "model.dtype": "float32"}, "spec.model.dtype", "must be auto or bfloat16"),
    Row("pure bf16 offloaded", F, {"training.pureBf16": True, "tuner.type": "full", "distributed": {"strategy": "zero2", "offload": {"optimizer": True}}}, "spec.training.pureBf16", "leave it out with distributed.offload"),
    Row("env that loads code", F, {"pod.env": [{"name": "PYTHONPATH", "value": "/mnt"}]}, "spec.pod.env[0].name", "it makes the program load other code"),
    Row("env that loads a library", D, {"pod.env": [{"name": "A"}, {"name": "LD_PRELOAD", "value": "x.so"}]}, "spec.pod.env[1].name", "build an image of your own"),
    Row("env that loads in another way", M, {"pod.env": [{"name": "LD_AUDIT"}]}, "spec.pod.env[0].name", "it makes the program load other code"),
    Row("env of the gang", F, {"pod.env": [{"name": "WORLD_SIZE", "value": "9"}]}, "spec.pod.env[0].name", "it follows from spec.distributed"),
    Row("env twice", F, {"pod.env": [{"name": "A"}, {"name": "A"}]}, "spec.pod.env[1]", "Duplicate value"),
    Row("mount over the image", F, {"pod.volumes": [{"claimName": "c", "mountPath": "/opt/venv"}]}, "spec.pod.volumes[0].mountPath", "must be an absolute path"),
    Row("mount over the token", D, {"pod.volumes": [{"claimName": "c", "mountPath": "/var/run/trimtab/token"}]}, "spec.pod.volumes[0].mountPath", "must be an absolute path"),
    Row("mount with dots", M, {"pod.volumes": [{"claimName": "c", "mountPath": "/mnt/../work"}]}, "spec.pod.volumes[0].mountPath", "must be an absolute path"),
    Row("mount twice", F, {"pod.volumes": [{"claimName": "c", "mountPath": "/mnt"}, {"claimName": "d", "mountPath": "/mnt"}]}, "spec.pod.volumes[1]", "Duplicate value"),
    # Merging
    Row("weight of nothing", M, {"adapters.0.weight": 0}, "spec.adapters[0].weight", "remove it from adapters instead"),
    Row("shard of no size", M, {"maxShardSize": "0GB"}, "spec.maxShardSize", "must be a size such as 500MB or 4GB"),
    # Quantised export
    Row("nothing to do", M, {"adapters": []}, "spec.adapters", "give at least one adapter, or base and quantize"),
    Row("quantise nothing", M, {"adapters": GONE, "quantize": {"scheme": "fp8"}}, "spec.adapters", "give at least one adapter, or base and quantize"),
    Row("gptq without rows", M, {"quantize": {"scheme": "gptq"}}, "spec.quantize.calibration", "give rows that the model is used on"),
    Row("fp8 with rows", M, {"quantize": {"scheme": "fp8", "calibration": {"from": {"inline": "{}"}}}}, "spec.quantize.calibration", "the other schemes look at no rows"),
    Row("groups of int8", M, {"quantize": {"scheme": "int8", "groupSize": 64}}, "spec.quantize.groupSize", "one scale for each output channel"),
    # Serving
    Row("two adapters of a name", D, {"adapters": [{"name": "a", "from": HUB}, {"name": "a", "from": HUB}]}, "spec.adapters", "give each adapter a name of its own"),
    Row("adapter named as the model", D, {"model.name": "a", "adapters": [{"name": "a", "from": HUB}]}, "spec.adapters", "names an adapter as the model is named"),
    Row("adapter named as the resource", D, {"adapters": [{"name": "job", "from": HUB}]}, "spec.adapters", "set model.name"),
    Row("argument that is not allowed", D, {"engine.extraArgs": ["--trust-remote-code"]}, "spec.engine.extraArgs[0]", "is not an allowed argument"),
    Row("argument with a space", D, {"engine.extraArgs": ["--seed 1"]}, "spec.engine.extraArgs[0]", "write it as --name or --name=value"),
)  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_rule_refuses(api: Any, row: Row) -> None:
    answer = api.create("default", PLURALS[row.kind], build(row.kind, row.changes), dryRun="All")
    refused(answer, row.field, row.part)


ACCEPTED = (
    (F, {}), (M, {}), (D, {}),
    (F, {"model": {"scratch": SCRATCH}}),
    (F, {"model": {"scratch": SCRATCH}, "tuner.type": "full"}),
    (F, {"method": "pretrain", "dataset.truncation": "split"}),
    (F, {"method": "dpo"}), (F, {"method": "cpo", "cpo": {}}), (F, {"method": "simpo", "simpo": {}}), (F, {"method": "orpo", "orpo": {}}),
    (F, {"distributed": {"nodes": 2, "processesPerNode": 2, "parallel": {"sequence": 4}}}),
    (F, {"tuner": {"type": "full"}, "distributed": {"nodes": 2, "processesPerNode": 2, "parallel": {"tensor": 4}}}),
    (F, {"tuner": {"type": "full"}, "distributed": {"nodes": 2, "parallel": {"expert": 2}}}),
    (F, {"method": "kto", "kto": {}, "training.perDeviceBatchSize": 2}),
    (F, {"method": "dpo", "dpo": {"lossType": ["sigmoid", "bcoPair", "sft"], "lossWeights": [0.8, 0.2, 1]}}),
    (F, {"method": "dpo", "dpo": {"lossType": ["exoPair"], "labelSmoothing": 1e-3}}),
    (F, {"method": "rewardModel"}), (F, {"method": "rewardModel", "rewardModel": {"centerRewardsCoefficient": 0.01}}), (F, {"method": "reranker"}),
    (F, {"method": "sequenceClassification", "classification": {"numLabels": 2}}), (F, {"method": "sequenceClassification", "classification": {"labels": ["a", "b"]}}),
    (F, {"method": "sequenceClassification", "classification": {"problemType": "regression"}}), (F, {"method": "sequenceClassification", "classification": {"problemType": "multiLabel", "numLabels": 1}}),
    (F, {"method": "embedding", "training.perDeviceBatchSize": 2}), (F, {"method": "embedding", "embedding": {"loss": "contrastive", "margin": 0.2}}), (F, {"method": "embedding", "embedding": {"hardNegatives": 2}}),
    (F, {"method": "reranker", "reranker": {"loss": "listwise", "temperature": 0.5}}),
    (F, {"tuner": {"type": "lora"}}), (F, {"tuner": {"type": "full"}}), (F, {"tuner": {"lora": {}}}),
    (F, {"tuner.lora": {"targetParameters": ["experts.up"], "dropout": 0}}), (F, {"tuner.lora": {"initWeights": "olora", "rank": 256}}),
    (F, {"tuner": {"type": "full", "freeze": {"ratio": 1}}, "model.newTokens": ["<|a|>"]}), (F, {"tuner": {"continueFrom": HUB}}),
    (F, {"training": {"earlyStopping": {}, "evaluateAtStart": True, "neftuneAlpha": 5, "groupByLength": True}, "dataset.validationSplit": 0.1}),
    (F, ASKED), (F, {**ASKED, "tuner.continueFrom": HUB, "model.quantization": {"method": "bnb4"}}), (F, {**ASKED, "distributed.strategy": "deviceMap"}),
    (F, {"training.maxSteps": 0, "evaluation": {}, "dataset.validationSplit": 0.1}),
    (F, {"evaluation": {}, "dataset.validationSplit": 0.1}), (F, {"evaluation": {"metrics": []}, "dataset.validation": [{"from": {"inline": "{}"}}]}),
    (F, {"evaluation": {"generate": {"temperature": 0.5, "topP": 0.9}, "metrics": ["exactMatch", "rouge", "cosine"], "atStart": True}, "dataset.validationSplit": 0.1, "method": "dpo"}),
    (F, {"method": "grpo", "grpo": GRPO}), (F, {"method": "grpo", "grpo": {"rewards": [{"python": {"configMapKeyRef": {"name": "rewards", "key": "a-1.py"}, "function": "close"}}]}}), (F, {"method": "ppo", "ppo": PPO, "dataset.truncation": "left"}), (F, {"method": "gkd", "gkd": GKD}),
    (F, {"method": "grpo", "grpo": {**GRPO, "importanceSampling": "sequence"}, "training.gradientAccumulationSteps": 4, "distributed.processesPerNode": 2}),
    (F, {"model.quantization": {"method": "bnb4", "storageDtype": "bfloat16"}, "distributed.strategy": "fsdp2"}),
    (F, {"model.quantization": {"method": "bnb8"}, "distributed.strategy": "zero2", "model.dtype": "float16"}),
    (F, {"distributed": {"strategy": "deviceMap", "processesPerNode": 1}}),
    (F, {"method": "dpo", "model.quantization": {"method": "bnb4"}, "distributed.strategy": "fsdp2"}),
    (F, {"method": "rewardModel", "model.quantization": {"method": "bnb4"}, "distributed.strategy": "zero3"}),
    (F, {"method": "kto", "training.perDeviceBatchSize": 2, "tuner.type": "full", "distributed": {"strategy": "zero3", "offload": {"parameters": True}}}),
    (F, {"method": "grpo", "grpo": GRPO, "distributed.strategy": "fsdp2", "model.quantization": {"method": "bnb4"}}), (F, {"method": "ppo", "ppo": PPO, "distributed.strategy": "zero3"}), (F, {"method": "gkd", "gkd": GKD, "distributed.strategy": "deviceMap"}),
    (F, {**BESIDE, "tuner": {"lora": {"rank": 64, "rsLora": True, "targetModules": ["q_proj"]}}, "rollout.resources": {"limits": {"nvidia.com/gpu": 1}}}), (F, {**BESIDE, "tuner.continueFrom": HUB, "distributed.strategy": "fsdp2"}), (F, {**BESIDE, "tuner.type": "full"}), (F, {"method": "ppo", "ppo": PPO, "rollout": {}}),
    (F, {"distributed": {"strategy": "zero3", "offload": {"optimizer": True, "parameters": True}}}),
    (F, {"distributed": {"strategy": "fsdp2", "offload": {"parameters": True}}}),
    (F, {"tuner.type": "full", "training.pureBf16": True, "distributed.strategy": "zero2"}),
    (F, {"dataset.validation": []}),
    (F, {"dataset.streaming": {}, "training.maxSteps": 9}), (F, {"dataset.interleave": {}}), (F, {"dataset.interleave": {"weights": [2]}}),
    (F, {"dataset.packing": {}}), (F, {"dataset.packing": {"length": 4096}}), (F, {"dataset.packing": None}),
    (F, {"method": "pretrain", "dataset.packing": {"strategy": "bfdSplit", "length": 256}}),
    (F, {"dataset.validation": [], "dataset.validationSplit": 0.1}),
    (F, {"output.uri": "s3://bucket"}), (F, {"output.uri": "s3://my.bucket-1/a/b c"}),
    (F, {"storage.endpoint": "http://[::1]:9000/"}),
    (F, {"storage": {"anonymous": False, "credentials": {"secretName": "s"}}}),
    (F, {"pod.resources": {"requests": {"cpu": 1, "memory": "1.5Gi"}, "limits": {"nvidia.com/gpu": "8"}}}),
    (F, {"pod.affinity": {"podAffinity": {"anything": [1, {"deep": True}]}}}),
    (F, {"pod.env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, {"name": "NCCL_DEBUG"}]}),
    (F, {"pod.volumes": [{"claimName": "c", "mountPath": "/mnt/a.b"}, {"claimName": "c", "mountPath": "/optional"}]}),
    (F, {"model.from": {"volume": {"claimName": "c", "path": "a..b/c"}}}),
    (F, {"tuner": None, "pod": None, "storage": None}),
    (M, {"adapters": GONE, "base": HUB, "quantize": {"scheme": "int4", "groupSize": 32}}),
    (M, {"quantize": {"scheme": "awq", "calibration": {"from": {"inline": "{}"}}}}),
    (M, {"adapters.0.weight": -0.5, "adapters.1": {"from": HUB}}),
    (D, {"adapters": [{"name": "a", "from": HUB}, {"name": "b", "from": HUB}]}),
    (D, {"model.name": "base", "adapters": [{"name": "job", "from": HUB}]}),
    (D, {"engine.extraArgs": ["--enforce-eager", "--max-num-seqs=4"]}),
    (D, {"replicas": 0}),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(ACCEPTED)))
def test_rules_let_pass(api: Any, number: int) -> None:
    kind, changes = ACCEPTED[number]
    answer = api.create("default", PLURALS[kind], build(kind, changes), dryRun="All")
    assert answer.accepted, answer.message


def rules(node: dict[str, Any]) -> Iterator[str]:
    """The message of every rule in a schema."""
    yield from (rule["message"] for rule in node.get(RULES_KEY, ()))
    children = [*node.get("properties", {}).values(), node.get("items"), node.get("additionalProperties")]
    for child in children:
        if isinstance(child, dict):
            yield from rules(child)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_rule_is_seen_to_refuse(kind: str) -> None:
    elsewhere = ("may not change once the job has started", f"must have at most {NAME_LIMIT} characters")
    shared = [row.part for row in REFUSED]
    for message in set(rules(SCHEMAS[kind])):
        assert message.startswith(elsewhere) or any(part in message for part in shared), f"no row for: {message}"


# ------------------------------------------------------------------------------------------- bounds

Steps = tuple[str | int, ...]


def documents(kind: str) -> list[dict[str, Any]]:
    """The examples of a kind, as JSON: together they hold every field."""
    model = next(resource.model for resource in RESOURCES if resource.kind == kind)
    read = [document for file in sorted(EXAMPLES.rglob("*.yaml")) for document in yaml.safe_load_all(file.read_text())]
    whole = [
        model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"]
        for document in read
        if document["kind"] == kind
    ]
    return [{**build(kind, {}), "spec": spec} for spec in whole]


def leaves(node: dict[str, Any], value: Any, steps: Steps) -> Iterator[tuple[Steps, dict[str, Any], Any]]:
    """Every value of a document with its schema."""
    yield steps, node, value
    if isinstance(value, dict):
        for name, child in value.items():
            below = node.get("properties", {}).get(name) or node.get("additionalProperties")
            if isinstance(below, dict):
                yield from leaves(below, child, (*steps, name))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from leaves(node["items"], child, (*steps, index))


def violations(node: dict[str, Any], value: Any) -> Iterator[tuple[str, Any, str]]:
    """A value beyond each bound of a node: the bound's name, the value, and what the server says of it."""
    yield from numbers_beyond(node)
    yield from texts_beyond(node)
    yield from collections_beyond(node, value)
    if "enum" in node:
        yield "enum", -1 if node["type"] == "integer" else "no-such-word", "Unsupported value"
    if "type" in node:
        yield "type", "text" if node["type"] == "object" else {}, "must be of type"


def numbers_beyond(node: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    if "minimum" in node:
        yield "minimum", node["minimum"] - (not node.get("exclusiveMinimum")), "greater than"
    if "maximum" in node:
        yield "maximum", node["maximum"] + (not node.get("exclusiveMaximum")), "less than"


def texts_beyond(node: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    if "maxLength" in node and node.get("type") == "string":
        yield "maxLength", "a" * (node["maxLength"] + 1), "Too long"
    if node.get("minLength"):
        yield "minLength", "", "should be at least"
    if "pattern" in node:
        yield "pattern", "!" * max(1, node.get("minLength", 1)), "should match"


def collections_beyond(node: dict[str, Any], value: Any) -> Iterator[tuple[str, Any, str]]:
    if "maxItems" in node:
        yield "maxItems", [value[0] if value else {}] * (node["maxItems"] + 1), "must have at most"
    if node.get("minItems"):
        yield "minItems", [], "should have at least"
    if "maxProperties" in node:
        some = next(iter(value.values()), "a")
        yield "maxProperties", {f"k{number}": some for number in range(node["maxProperties"] + 1)}, "must have at most"
    for name in node.get("required", ()):
        yield f"required.{name}", {key: each for key, each in value.items() if key != name}, "Required value"


def path_of(steps: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def put(document: dict[str, Any], steps: Steps, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    node: Any = changed
    for step in steps[:-1]:
        node = node[step]
    node[steps[-1]] = value
    return changed


def bounds(kind: str) -> dict[str, tuple[dict[str, Any], str, str]]:
    """One violation of each bound of each field of a kind: by name, the document, the field and the words."""
    found: dict[str, tuple[dict[str, Any], str, str]] = {}
    for document in documents(kind):
        for steps, node, value in leaves(SCHEMAS[kind]["properties"]["spec"], document["spec"], ("spec",)):
            general = path_of(tuple(step if isinstance(step, str) else 0 for step in steps))
            for bound, wrong, words in violations(node, value):
                field = path_of(steps) + (f".{bound.removeprefix('required.')}" if "required." in bound else "")
                found.setdefault(f"{general}:{bound}", (put(document, steps, wrong), field, words))
    return found


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_bound_of_every_field_refuses(api: Any, kind: str) -> None:
    rows = bounds(kind)
    assert len(rows) > 60
    wrong = []
    for name, (document, field, words) in rows.items():
        answer = api.create("default", PLURALS[kind], document, dryRun="All")
        hits = [message for where, message in answer.causes if where == field and words in message]
        if answer.accepted or not hits:
            wrong.append(f"{name}: wanted {field}: {words}; got {answer.status} {answer.message[:300]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_unknown_field_is_refused_at_every_depth(api: Any, kind: str) -> None:
    wrong = []
    for document in documents(kind):
        for steps, node, value in leaves(SCHEMAS[kind]["properties"]["spec"], document["spec"], ("spec",)):
            if "properties" not in node:
                continue
            answer = api.create("default", PLURALS[kind], put(document, steps, {**value, "mistyped": 1}), dryRun="All")
            if answer.accepted or f'unknown field "{path_of((*steps, "mistyped"))}"' not in answer.message:
                wrong.append(f"{path_of(steps)}: {answer.status} {answer.message}")
    assert not wrong, "\n".join(wrong)


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("name", ["a" * (NAME_LIMIT + 1), "a.b", "1a"], ids=["long", "dots", "digit-first"])
def test_name_is_refused(api: Any, kind: str, name: str) -> None:
    answer = api.create("default", PLURALS[kind], build(kind, {}, name), dryRun="All")
    refused(answer, "metadata.name", f"must have at most {NAME_LIMIT} characters")


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("name", ["a", "a" * NAME_LIMIT, "a-1"], ids=["short", "long", "dash"])
def test_name_is_accepted(api: Any, kind: str, name: str) -> None:
    answer = api.create("default", PLURALS[kind], build(kind, {}, name), dryRun="All")
    assert answer.accepted, answer.message


# --------------------------------------------------------------------------------------- started jobs

STARTED = {"status": {"startTime": "2026-01-01T00:00:00Z"}}

EDITS: dict[str, dict[str, Any]] = {
    "FineTuneJob": {
        "method": "pretrain",
        "model": {"dtype": "float16"},
        "dataset": {"train": [{"from": {"inline": '{"a": 1}'}}]},
        "template": {"system": "Be brief."},
        "tuner": {"lora": {"rank": 16}},
        "training": {"learningRate": 1e-3},
        "evaluation": {"rows": 5},
        "reports": {"mlflow": {"server": "https://mlflow.example.com", "experiment": "support"}},
        "checkpoint": {"keep": 5},
        "distributed": {"nodes": 2},
        "output": {"uri": PLACE},
        "storage": {"region": "eu-central-1"},
        "pod": {"affinity": {"nodeAffinity": {"a": 1}}},
        "retries": {"limit": 0},
        "activeDeadlineSeconds": 5,
        "hangTimeoutSeconds": 60,
        **{method: {"beta": 0.2} for method in ("dpo", "kto", "cpo", "simpo")},
        **{method: {} for method in ("orpo", "grpo", "ppo", "gkd")},
        "rollout": {"tensorParallel": 2},
        **{block: {} for block in ("rewardModel", "classification", "embedding", "reranker")},
    },
    "MergeJob": {
        "adapters": [{"from": HUB, "weight": 2}],
        "base": HUB,
        "dtype": "float16",
        "maxShardSize": "1GB",
        "verify": {"enabled": False},
        "quantize": {"scheme": "fp8"},
        "output": {"uri": PLACE},
        "storage": {"region": "eu-central-1"},
        "pod": {"priorityClassName": "high"},
        "retries": 0,
        "activeDeadlineSeconds": 5,
    },
}
FREE = {"suspend", "ttlSecondsAfterFinished"}


def edit(field: str, value: Any) -> dict[str, Any]:
    """A change of one field; a method's block comes with the method's example, whose rows and steps fit it."""
    apart = {"rewardModel": "reward-model", "classification": "sequence-classification", "rollout": "grpo-vllm"}
    named = apart.get(field, field)
    example = EXAMPLES / "methods" / f"{named}.yaml"
    if not example.is_file():
        return {"spec": {field: value}}
    whole = yaml.safe_load(example.read_text())["spec"]
    whole.pop("model")
    return {"spec": {**whole, field: {**whole.get(field, {}), **value}}}


@pytest.mark.parametrize("kind", EDITS)
def test_edits_cover_every_field(kind: str) -> None:
    assert set(SCHEMAS[kind]["properties"]["spec"]["properties"]) == set(EDITS[kind]) | FREE


@pytest.mark.parametrize("kind", EDITS)
def test_job_may_change_until_it_starts_and_not_afterwards(api: Any, namespace: str, kind: str) -> None:
    plural = PLURALS[kind]
    made = api.create(namespace, plural, build(kind, {}))
    assert made.accepted, made.message
    for field, value in EDITS[kind].items():
        answer = api.patch(namespace, plural, "job", edit(field, value), dryRun="All")
        assert answer.accepted, f"{field}: {answer.message}"
    assert api.patch(namespace, plural, "job", STARTED, subresource="status").accepted
    for field, value in EDITS[kind].items():
        answer = api.patch(namespace, plural, "job", edit(field, value), dryRun="All")
        refused(answer, f"spec.{field}", "delete the job, or apply it under another name")
    for change in ({"suspend": True}, {"ttlSecondsAfterFinished": 60}, {"ttlSecondsAfterFinished": None}):
        answer = api.patch(namespace, plural, "job", {"spec": change})
        assert answer.accepted, answer.message
    again = build(kind, {})
    read = api.read(namespace, plural, "job").body
    again["metadata"] = {"name": "job", "resourceVersion": read["metadata"]["resourceVersion"]}
    path = f"/apis/trimtab.dev/v1alpha1/namespaces/{namespace}/{plural}/job"
    assert api.request("PUT", path, again).accepted, "applying the very same job again"


def test_started_job_with_everything_set_is_cheap_enough_to_guard(api: Any, namespace: str) -> None:
    """The run-time budget of the rules holds for the largest parts that an object can have."""
    rows = "{}" * 30_000
    parts = [{"from": {"inline": rows}} for _ in range(8)]
    body = build(F, {"dataset.train": parts, "pod.env": [{"name": f"N{n}", "value": "v" * 4096} for n in range(64)]})
    made = api.create(namespace, "finetunejobs", body)
    assert made.accepted, made.message
    assert api.patch(namespace, "finetunejobs", "job", STARTED, subresource="status").accepted
    answer = api.patch(namespace, "finetunejobs", "job", {"spec": {"suspend": True}})
    assert answer.accepted, answer.message
    parts[-1]["from"]["inline"] = "[]" * 30_000
    answer = api.patch(namespace, "finetunejobs", "job", {"spec": {"dataset": {"train": parts}}})
    refused(answer, "spec.dataset", "may not change once the job has started")


def test_adapters_come_and_go_while_served(api: Any, namespace: str) -> None:
    assert api.create(namespace, "modeldeployments", build(D, {})).accepted
    assert api.patch(namespace, "modeldeployments", "job", STARTED, subresource="status").accepted
    for adapters in ([{"name": "a", "from": HUB}], []):
        answer = api.patch(namespace, "modeldeployments", "job", {"spec": {"adapters": adapters}})
        assert answer.accepted, answer.message
    clash = {"spec": {"adapters": [{"name": "job", "from": HUB}]}}
    refused(api.patch(namespace, "modeldeployments", "job", clash), "spec.adapters", "set model.name")
