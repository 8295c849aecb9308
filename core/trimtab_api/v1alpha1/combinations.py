"""Which fields of a FineTuneJob cannot go together: one table, applied by the API server and by runs without one.

A row says what must hold of `spec`, the field that the user reads about, and the way out. Every row runs at create and
update alike, so each must hold for whatever an older version of it accepted.
"""

from __future__ import annotations

from trimtab_api.schema import Rule

SCRATCH = (
    Rule(
        "!has(self.model.scratch) || !has(self.tuner.type) || self.tuner.type != 'lora'",
        "must be full, or left out: random weights have no base to adapt",
        field_path=".tuner.type",
    ),
    Rule(
        "!has(self.model.scratch) || !has(self.tuner.lora)",
        "remove it: random weights have no base to adapt",
        field_path=".tuner.lora",
    ),
    Rule(
        "!has(self.model.scratch) || !has(self.tuner.freeze)",
        "remove it: random weights that never move are of no use",
        field_path=".tuner.freeze",
    ),
    Rule(
        "!has(self.model.scratch) || !has(self.tuner.continueFrom)",
        "remove it: no adapter was trained on random weights",
        field_path=".tuner.continueFrom",
    ),
    Rule(
        "!has(self.model.scratch) || !has(self.tuner.adapters)",
        "remove it: no adapters were trained on random weights",
        field_path=".tuner.adapters",
    ),
    Rule(
        "!has(self.model.scratch) || self.dataset.maxLength <= self.model.scratch.maxLength",
        "must not exceed model.scratch.maxLength, the longest sequence that the model is made for",
        field_path=".dataset.maxLength",
    ),
)
"""A model from random weights."""

TUNER = (
    Rule(
        "!has(self.tuner.continueFrom) || !has(self.model.newTokens) || size(self.model.newTokens) == 0",
        "leave it out: an adapter that goes on has no room for further tokens",
        field_path=".model.newTokens",
    ),
    Rule(
        "!has(self.tuner.lora) || self.tuner.lora.bias == 'none' || self.method in ['pretrain', 'sft']",
        "must be none but for pretrain and sft: other methods compare with the base, and biases that moved stay moved",
        field_path=".tuner.lora.bias",
    ),
    Rule(
        "!has(self.tuner.lora) || !has(self.tuner.lora.targetModules) || !('lm_head' in self.tuner.lora.targetModules)",
        "leave lm_head out: losses read the head's weight past an adapter, and an adapter that is on it is published with "
        "the whole head; name it in tuner.lora.modulesToSave to tune it in full",
        field_path=".tuner.lora.targetModules",
    ),
)
"""Tuners, models and methods."""

_VALIDATED = "has(self.dataset.validationSplit) || (has(self.dataset.validation) && self.dataset.validation.size() > 0)"

TRAINING = (
    Rule(
        f"!has(self.training.earlyStopping) || {_VALIDATED}",
        "needs validation rows: give dataset.validation or dataset.validationSplit",
        field_path=".training.earlyStopping",
    ),
    Rule(
        f"!self.training.evaluateAtStart || {_VALIDATED}",
        "needs rows to validate on: give dataset.validation or dataset.validationSplit",
        field_path=".training.evaluateAtStart",
    ),
    Rule(
        "!has(self.training.neftuneAlpha) || self.method in ['pretrain', 'sft']",
        "leave it out: noise on the embeddings is for pretrain and sft",
        field_path=".training.neftuneAlpha",
    ),
    Rule(
        "!self.training.groupByLength || "
        "(self.method in ['pretrain', 'sft'] && self.dataset.shuffle && !has(self.dataset.packing))",
        "must be false but for pretrain and sft with dataset.shuffle and without packing: elsewhere the order of rows "
        "has a meaning, or their lengths are alike already",
        field_path=".training.groupByLength",
    ),
)
"""The optimisation."""

DATA = (
    Rule(
        "self.method == 'pretrain' || !has(self.dataset.truncation) || self.dataset.truncation != 'split'",
        "split cuts answers from their questions: only pretrain takes it, choose delete, left or right",
        field_path=".dataset.truncation",
    ),
)
"""Rows and methods."""

_LANGUAGE = "self.method in ['pretrain', 'sft']"
"""The methods that learn the next token of every row alone."""

PACKING = (
    Rule(
        f"{_LANGUAGE} || !self.dataset.paddingFree",
        "must be false, or method sft or pretrain: the other methods compare rows, which must stay apart",
        field_path=".dataset.paddingFree",
    ),
    Rule(
        f"{_LANGUAGE} || !self.dataset.ignoreEmptyThink",
        "must be false, or method sft or pretrain: the other methods judge whole answers",
        field_path=".dataset.ignoreEmptyThink",
    ),
    Rule(
        "!has(self.dataset.packing) || self.method in ['pretrain', 'sft']",
        "remove it: only pretrain and sft put several rows into one",
        field_path=".dataset.packing",
    ),
    Rule(
        "!has(self.dataset.packing) || self.method == 'pretrain' || !has(self.dataset.packing.strategy) || "
        "self.dataset.packing.strategy == 'bfd'",
        "must be bfd: the others cut answers from their questions, which only pretrain takes",
        field_path=".dataset.packing.strategy",
    ),
    Rule(
        "!has(self.dataset.packing) || !has(self.dataset.packing.length) || "
        "(has(self.dataset.packing.strategy) && self.dataset.packing.strategy != 'bfd') || "
        "self.dataset.packing.length >= self.dataset.maxLength",
        "must be at least dataset.maxLength, or a row that long fits no pack: raise it, or choose strategy: bfdSplit",
        field_path=".dataset.packing.length",
    ),
)
"""Several rows in one."""

_PREFERENCE = "self.method in ['dpo', 'kto', 'cpo', 'simpo', 'orpo']"

PREFERENCE = (
    *(
        Rule(
            f"!has(self.{block}) || self.method == '{block}'",
            f"remove it, or set method: {block}: these are that method's knobs",
            field_path=f".{block}",
        )
        for block in ("dpo", "kto", "cpo", "simpo", "orpo")
    ),
    Rule(
        f"!({_PREFERENCE}) || !has(self.model.scratch)",
        "random weights have no answers to choose between: tune with sft first, and name its result in model.from",
        field_path=".model.scratch",
    ),
    Rule(
        f"!({_PREFERENCE}) || self.dataset.loss != 'all'",
        "all would learn the prompt as well, which preferences say nothing of: choose auto, assistant or lastTurn",
        field_path=".dataset.loss",
    ),
    Rule(
        f"!({_PREFERENCE}) || self.dataset.toolCallWeight == 1.0",
        "must be 1: preferences compare whole answers",
        field_path=".dataset.toolCallWeight",
    ),
    Rule(
        "!(self.method in ['dpo', 'kto']) || !has(self.model.newTokens) || size(self.model.newTokens) == 0",
        "leave it out: the reference does not know them; teach new tokens with sft first",
        field_path=".model.newTokens",
    ),
    Rule(
        "self.method != 'kto' || self.training.perDeviceBatchSize > 1",
        "must be at least 2 with kto: its reference point is measured on other rows of the same forward pass",
        field_path=".training.perDeviceBatchSize",
    ),
    Rule(
        "!has(self.dpo) || !has(self.dpo.lossWeights) || self.dpo.lossWeights.size() == self.dpo.lossType.size()",
        "must have one weight for each of dpo.lossType",
        field_path=".dpo.lossWeights",
    ),
    Rule(
        "!has(self.dpo) || self.dpo.lossType.all(each, self.dpo.lossType.exists_one(other, other == each))",
        "names a loss twice: name it once, and weigh it with dpo.lossWeights",
        field_path=".dpo.lossType",
    ),
    Rule(
        "!has(self.dpo) || self.dpo.lossType.exists(each, each != 'sft')",
        "sft alone compares nothing: add another loss, or use method sft",
        field_path=".dpo.lossType",
    ),
    Rule(
        "!has(self.dpo) || !has(self.dpo.rpoAlpha) || !('sft' in self.dpo.lossType)",
        "leave it out: sft in dpo.lossType is the same term, weighed by dpo.lossWeights",
        field_path=".dpo.rpoAlpha",
    ),
    Rule(
        "!has(self.dpo) || self.dpo.labelSmoothing == 0.0 || "
        "self.dpo.lossType.exists(each, each in ['robust', 'exoPair', 'aot', 'aotUnpaired'])",
        "must be 0, or dpo.lossType one of robust, exoPair, aot, aotUnpaired: the other losses do not look at it",
        field_path=".dpo.labelSmoothing",
    ),
    Rule(
        "!has(self.dpo) || !('exoPair' in self.dpo.lossType) || self.dpo.labelSmoothing > 0.0",
        "must be above 0 with exoPair; its paper recommends 1e-3",
        field_path=".dpo.labelSmoothing",
    ),
    Rule(
        "!has(self.dpo) || !self.dpo.lossType.exists(each, each in ['aot', 'aotUnpaired']) || "
        "self.training.perDeviceBatchSize > 1",
        "must be at least 2 with aot and aotUnpaired: they compare the sorted rows of one forward pass",
        field_path=".training.perDeviceBatchSize",
    ),
    Rule(
        "!has(self.dpo) || !self.dpo.precomputeRefLogProbs || self.distributed.nodes == 1",
        "must be false with several nodes: the log-probabilities are kept on one pod's disk",
        field_path=".dpo.precomputeRefLogProbs",
    ),
)
"""Methods that learn from preferences."""

_STREAMED = "!has(self.dataset.streaming)"

STREAMING = (
    Rule(
        f"{_STREAMED} || {_LANGUAGE}",
        "remove it, or set method: sft or pretrain: the other methods read their rows before the training",
        field_path=".dataset.streaming",
    ),
    Rule(
        f"{_STREAMED} || has(self.training.maxSteps)",
        "must be given with dataset.streaming: nobody knows how many rows a stream has",
        field_path=".training.maxSteps",
    ),
    Rule(
        f"{_STREAMED} || !has(self.dataset.validationSplit)",
        "leave it out with dataset.streaming, and give dataset.validation rows of their own",
        field_path=".dataset.validationSplit",
    ),
    Rule(
        f"{_STREAMED} || !has(self.dataset.packing)",
        "leave it out with dataset.streaming: packs are made of rows that are all there",
        field_path=".dataset.packing",
    ),
    Rule(
        f"{_STREAMED} || !has(self.dataset.train) || !self.dataset.train.exists(part, has(part.sample))",
        "leave out sample with dataset.streaming: rows are drawn from a stream by interleave.weights alone",
        field_path=".dataset.train",
    ),
    Rule(
        f"{_STREAMED} || !self.training.groupByLength",
        "must be false with dataset.streaming: rows of like length are picked from rows that are all there",
        field_path=".training.groupByLength",
    ),
    Rule(
        f"{_STREAMED} || !has(self.model.scratch) || !has(self.model.scratch.tokenizer.train)",
        "give tokenizer.from with dataset.streaming: a tokenizer is learnt from rows that are all there",
        field_path=".model.scratch.tokenizer.train",
    ),
)
"""Rows that are read while the training runs."""

MULTIMODAL = (
    Rule(
        "!has(self.dataset.multimodal) || (self.method != 'ppo' && self.method != 'embedding')",
        "remove it with ppo and embedding: each reads text alone",
        field_path=".dataset.multimodal",
    ),
)
"""Rows that show more than text."""

ROLLOUT = (
    Rule(
        "self.method != 'grpo' || has(self.grpo)",
        "give grpo.rewards: without a reward there is nothing to learn from",
        field_path=".grpo",
    ),
    Rule("self.method == 'grpo' || !has(self.grpo)", "remove it, or set method: grpo", field_path=".grpo"),
    Rule(
        "self.method != 'ppo' || has(self.ppo)",
        "give ppo.rewardModel: without a reward there is nothing to learn from",
        field_path=".ppo",
    ),
    Rule("self.method == 'ppo' || !has(self.ppo)", "remove it, or set method: ppo", field_path=".ppo"),
    Rule(
        "self.method != 'gkd' || has(self.gkd)",
        "give gkd.teacher: the model to learn from",
        field_path=".gkd",
    ),
    Rule("self.method == 'gkd' || !has(self.gkd)", "remove it, or set method: gkd", field_path=".gkd"),
    Rule(
        "!(self.method in ['grpo', 'ppo', 'gkd']) || !has(self.model.scratch)",
        "give model.from: random weights say nothing that could be judged",
        field_path=".model.scratch",
    ),
    Rule(
        "!(self.method in ['grpo', 'ppo', 'gkd']) || self.dataset.truncation in ['auto', 'delete', 'left']",
        "must be delete or left: a prompt that is cut at its end asks something else",
        field_path=".dataset.truncation",
    ),
    Rule(
        "!(self.method in ['grpo', 'ppo', 'gkd']) || !has(self.model.newTokens) || size(self.model.newTokens) == 0",
        "leave it out: the model as it was, or the teacher, does not know them; teach new tokens with sft first",
        field_path=".model.newTokens",
    ),
    Rule(
        "!(self.method in ['grpo', 'ppo', 'gkd']) || "
        "(self.dataset.loss == 'auto' && self.dataset.toolCallWeight == 1.0 && !self.dataset.ignoreEmptyThink)",
        "leave loss, toolCallWeight and ignoreEmptyThink out: whole answers are learnt from",
        field_path=".dataset.loss",
    ),
    Rule(
        "!has(self.grpo) || self.grpo.importanceSampling == 'token' || self.grpo.lossType == 'grpo'",
        "must be grpo with importanceSampling: sequence: the others would weigh answers by their length",
        field_path=".grpo.lossType",
    ),
    Rule(
        "!has(self.grpo) || !has(self.training.gradientAccumulationSteps) || "
        "!has(self.distributed.processesPerNode) || "
        "(self.training.perDeviceBatchSize * self.training.gradientAccumulationSteps * "
        "self.distributed.processesPerNode * self.distributed.nodes) % self.grpo.numGenerations == 0",
        "must divide training.perDeviceBatchSize x training.gradientAccumulationSteps x distributed.processesPerNode "
        "x distributed.nodes: a step learns from whole groups of answers",
        field_path=".grpo.numGenerations",
    ),
)
"""Methods that learn from what the model says."""

_ALONE = "(!has(self.rollout) || self.rollout.engine != 'vllm')"

ENGINE = (
    Rule(
        "!has(self.rollout) || self.method in ['grpo', 'ppo', 'gkd']",
        "remove it, or set method: grpo, ppo or gkd: the others learn from rows, and draw no answers to learn from",
        field_path=".rollout",
    ),
    Rule(
        "!has(self.rollout) || self.rollout.engine == 'vllm' || "
        "!has(self.rollout.resources) || "
        "((!has(self.rollout.resources.requests) || size(self.rollout.resources.requests) == 0) && "
        "(!has(self.rollout.resources.limits) || size(self.rollout.resources.limits) == 0))",
        "leave it out, or set engine: vllm: with transformers there is no container but the trainer's",
        field_path=".rollout.resources",
    ),
    Rule(
        f"{_ALONE} || !has(self.tuner.lora) || (!self.tuner.lora.dora && self.tuner.lora.bias == 'none' && "
        "(!has(self.tuner.lora.modulesToSave) || size(self.tuner.lora.modulesToSave) == 0) && "
        "!has(self.tuner.lora.targetParameters))",
        "leave dora, bias, modulesToSave and targetParameters out with rollout.engine: vllm, which takes plain adapters "
        "alone; or set rollout.engine: transformers",
        field_path=".tuner.lora",
    ),
    Rule(
        f"{_ALONE} || !has(self.tuner.lora) || !has(self.tuner.lora.targetModules) || "
        "!self.tuner.lora.targetModules.exists(name, name in ['lm_head', 'embed_tokens', 'wte'])",
        "leave embeddings and head out with rollout.engine: vllm, which takes adapters of the layers between them; or "
        "set rollout.engine: transformers",
        field_path=".tuner.lora.targetModules",
    ),
    Rule(
        f"{_ALONE} || !has(self.tuner.lora) || self.tuner.lora.initWeights in ['default', 'gaussian']",
        "must be default or gaussian with rollout.engine: vllm, which has the base as it was; or set rollout.engine: "
        "transformers",
        field_path=".tuner.lora.initWeights",
    ),
    Rule(
        f"{_ALONE} || !has(self.tuner.adapters)",
        "remove it with rollout.engine: vllm, which has the base as it was: merge these adapters first, or set "
        "rollout.engine: transformers",
        field_path=".tuner.adapters",
    ),
    Rule(
        f"{_ALONE} || !has(self.model.quantization)",
        "remove it with rollout.engine: vllm, which would answer with the weights as they were before they were "
        "quantised; or set rollout.engine: transformers",
        field_path=".model.quantization",
    ),
)
"""Who draws the answers."""

_HEADS = "self.method in ['rewardModel', 'sequenceClassification', 'embedding', 'reranker']"

HEADS = (
    *(
        Rule(
            f"!has(self.{block}) || self.method == '{method}'",
            f"remove it, or set method: {method}: these are that method's knobs",
            field_path=f".{block}",
        )
        for block, method in (
            ("rewardModel", "rewardModel"),
            ("classification", "sequenceClassification"),
            ("embedding", "embedding"),
            ("reranker", "reranker"),
        )
    ),
    Rule(
        "self.method != 'sequenceClassification' || has(self.classification)",
        "method sequenceClassification needs it: give numLabels, labels by name, or problemType: regression",
        field_path=".classification",
    ),
    Rule(
        f"!({_HEADS}) || self.dataset.loss == 'auto'",
        "leave it out: this method learns from whole rows, not from single tokens",
        field_path=".dataset.loss",
    ),
    Rule(
        f"!({_HEADS}) || (self.dataset.toolCallWeight == 1.0 && !self.dataset.ignoreEmptyThink)",
        "leave toolCallWeight and ignoreEmptyThink out: this method learns from whole rows, not from single tokens",
        field_path=".dataset",
    ),
    Rule(
        "self.method != 'embedding' || !has(self.dataset.truncation) || self.dataset.truncation != 'left'",
        "must be right or delete: whoever uses an embedder cuts texts at their end",
        field_path=".dataset.truncation",
    ),
    Rule(
        "self.method != 'embedding' || self.training.perDeviceBatchSize > 1 || "
        "(has(self.embedding) && (self.embedding.loss in ['cosineSimilarity', 'contrastive'] || "
        "(has(self.embedding.hardNegatives) && self.embedding.hardNegatives > 0)))",
        "must be at least 2: the other texts of the batch are what an anchor is held against",
        field_path=".training.perDeviceBatchSize",
    ),
)
"""Models that answer with numbers."""

QUANTIZED = (
    Rule(
        "!has(self.model.quantization) || !has(self.tuner.type) || self.tuner.type != 'full'",
        "remove it, or set tuner.type: lora: weights that are quantised cannot move",
        field_path=".model.quantization",
    ),
    Rule(
        "!has(self.model.quantization) || !has(self.model.scratch)",
        "remove it: random weights are all trained, and quantised ones cannot move",
        field_path=".model.quantization",
    ),
    Rule(
        "!has(self.model.quantization) || self.model.quantization.method != 'bnb8' || "
        "!(self.distributed.strategy in ['fsdp2', 'zero3'])",
        "fsdp2 and zero3 cannot split weights of 8 bit: choose method bnb4, or strategy ddp, zero1 or zero2",
        field_path=".model.quantization.method",
    ),
    Rule(
        "!has(self.model.quantization) || self.model.quantization.storageDtype != 'uint8' || "
        "!(self.distributed.strategy in ['fsdp2', 'zero3'])",
        "leave it out: fsdp2 and zero3 can split quantised weights only when they are stored as bfloat16",
        field_path=".model.quantization.storageDtype",
    ),
    Rule(
        "!has(self.model.quantization) || self.model.dtype != 'float16' || "
        "!(self.distributed.strategy in ['fsdp2', 'zero3'])",
        "choose bfloat16 or float32: under fsdp2 and zero3 quantised weights are stored as bfloat16, "
        "and float16 arithmetic would convert them",
        field_path=".model.dtype",
    ),
    Rule(
        "!has(self.model.quantization) || !has(self.tuner.adapters)",
        "remove it: quantised weights take no other adapter in; merge it first, or use continueFrom",
        field_path=".tuner.adapters",
    ),
    Rule(
        "!has(self.model.quantization) || !has(self.tuner.lora) || "
        "self.tuner.lora.initWeights in ['default', 'gaussian']",
        "must be default or gaussian: quantised weights give nothing out",
        field_path=".tuner.lora.initWeights",
    ),
)
"""Weights that are quantised as they are loaded."""

PARALLEL = (
    Rule(
        "self.distributed.strategy != 'deviceMap' || self.distributed.nodes == 1",
        "must be 1 with strategy deviceMap, where one process uses the devices of its pod",
        field_path=".distributed.nodes",
    ),
    Rule(
        "self.distributed.strategy != 'deviceMap' || !has(self.distributed.processesPerNode) || "
        "self.distributed.processesPerNode == 1",
        "must be 1, or left out, with strategy deviceMap, where one process uses the devices of its pod",
        field_path=".distributed.processesPerNode",
    ),
    Rule(
        "!self.distributed.offload.optimizer || self.distributed.strategy in ['zero1', 'zero2', 'zero3']",
        "needs strategy zero1, zero2 or zero3; with fsdp2 set offload.parameters, which takes the optimiser along",
        field_path=".distributed.offload.optimizer",
    ),
    Rule(
        "!self.distributed.offload.parameters || self.distributed.strategy in ['zero3', 'fsdp2']",
        "needs strategy zero3 or fsdp2: with the others every process computes with whole weights",
        field_path=".distributed.offload.parameters",
    ),
    Rule(
        "!(self.distributed.strategy in ['fsdp2', 'zero3']) || !has(self.tuner.adapters)",
        "remove it, or choose ddp, zero1 or zero2: weights that are split take no other adapter in",
        field_path=".tuner.adapters",
    ),
    Rule(
        "!(self.distributed.strategy in ['fsdp2', 'zero3']) || !has(self.tuner.lora) || "
        "self.tuner.lora.initWeights in ['default', 'gaussian']",
        "must be default or gaussian, or choose ddp, zero1 or zero2: weights that are split give nothing out",
        field_path=".tuner.lora.initWeights",
    ),
    Rule(
        "!(self.distributed.strategy in ['fsdp2', 'zero3']) || !has(self.model.newTokens) || "
        "size(self.model.newTokens) == 0",
        "leave it out, or choose ddp, zero1 or zero2: rows of a matrix that is split cannot be written",
        field_path=".model.newTokens",
    ),
    Rule(
        "self.training.optimizer == 'adamw' || !(self.distributed.strategy in ['zero1', 'zero2', 'zero3', 'fsdp2'])",
        "must be adamw, or choose ddp: the state of the others is not split",
        field_path=".training.optimizer",
    ),
)
"""How a run is spread over processes and devices."""

_SHARED = "self.distributed.parallel.sequence > 1"

SEQUENCE = (
    Rule(
        f"!({_SHARED}) || {_LANGUAGE}",
        "must be 1, or method sft or pretrain: the other methods compare or draw whole sequences",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || self.distributed.strategy != 'deviceMap'",
        "must be 1 with strategy deviceMap, where there is one process",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || !has(self.distributed.processesPerNode) || "
        "(self.distributed.nodes * self.distributed.processesPerNode) % self.distributed.parallel.sequence == 0",
        "must divide distributed.nodes x distributed.processesPerNode: each sequence is shared by as many processes",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || (!has(self.dataset.packing) && !self.dataset.paddingFree)",
        "must be 1, or leave out dataset.packing and dataset.paddingFree: attention is exchanged without the mask that "
        "keeps documents apart",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || !has(self.training.neftuneAlpha)",
        "must be 1, or leave out training.neftuneAlpha: its noise is measured by the length of a whole sequence",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || !has(self.training.maxSteps) || self.training.maxSteps > 0",
        "must be 1 with training.maxSteps: 0: answers are drawn from whole prompts",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        f"!({_SHARED}) || !has(self.model.scratch) || "
        "(self.model.scratch.attentionHeads % self.distributed.parallel.sequence == 0 && "
        "(!has(self.model.scratch.keyValueHeads) || "
        "self.model.scratch.keyValueHeads % self.distributed.parallel.sequence == 0))",
        "must divide model.scratch.attentionHeads and keyValueHeads: in attention each process has a part of the heads",
        field_path=".distributed.parallel.sequence",
    ),
    Rule(
        "self.distributed.parallel.context == 1",
        "must be 1: the ring attention of the trainer's libraries runs under fsdp2 on GPUs alone and drops every mask; "
        "distributed.parallel.sequence shares sequences under every strategy",
        field_path=".distributed.parallel.context",
    ),
    *(
        rule
        for name in ("tensor", "expert")
        for one in (f"self.distributed.parallel.{name} == 1",)
        for field in (f".distributed.parallel.{name}",)
        for rule in (
            Rule(
                f"{one} || self.distributed.parallel.sequence == 1",
                "must be 1, or sequence be 1: no two of them were tried together",
                field_path=field,
            ),
            Rule(
                f"{one} || {_LANGUAGE}",
                "must be 1, or method sft or pretrain: the other methods were not tried with it; zero3 and fsdp2 split "
                "the weights of every method",
                field_path=field,
            ),
            Rule(
                f"{one} || (has(self.tuner.type) && self.tuner.type == 'full' && !has(self.model.scratch))",
                "must be 1, or tuner.type be full and model.from be given: adapters do not know of layers that are "
                "shared, and weights are shared as they are read",
                field_path=field,
            ),
            Rule(
                f"{one} || self.distributed.strategy in ['auto', 'ddp']",
                "must be 1, or strategy auto: the other strategies split the same weights in their own way",
                field_path=field,
            ),
            Rule(
                f"{one} || !has(self.distributed.processesPerNode) || "
                f"self.distributed.nodes * self.distributed.processesPerNode == self.distributed.parallel.{name}",
                "must be distributed.nodes x distributed.processesPerNode: all processes share each layer",
                field_path=field,
            ),
            Rule(
                f"{one} || (!has(self.evaluation) && (!has(self.model.newTokens) || size(self.model.newTokens) == 0) "
                "&& !self.training.pureBf16 && !has(self.training.neftuneAlpha) && "
                "self.training.optimizer == 'adamw')",
                "must be 1, or leave out evaluation, model.newTokens, training.pureBf16, neftuneAlpha and every "
                "optimizer but adamw: they were not tried with layers that are shared",
                field_path=field,
            ),
        )
    ),
    Rule(
        "self.distributed.parallel.tensor == 1 || self.distributed.parallel.expert == 1",
        "must be 1, or tensor be 1: no two of them were tried together",
        field_path=".distributed.parallel.expert",
    ),
)
"""Processes that work at one row together."""

PRECISION = (
    Rule(
        "!self.training.pureBf16 || has(self.model.scratch) || (has(self.tuner.type) && self.tuner.type == 'full')",
        "needs tuner.type: full: adapters are small and stay in float32",
        field_path=".training.pureBf16",
    ),
    Rule(
        "!self.training.pureBf16 || self.model.dtype in ['auto', 'bfloat16']",
        "must be auto or bfloat16 with training.pureBf16",
        field_path=".model.dtype",
    ),
    Rule(
        "!self.training.pureBf16 || !(self.distributed.offload.optimizer || self.distributed.offload.parameters)",
        "leave it out with distributed.offload, which keeps the optimiser's state in float32",
        field_path=".training.pureBf16",
    ),
)
"""What weights are kept in."""

_LEARNS = "(!has(self.training.maxSteps) || self.training.maxSteps > 0)"

INFERENCE = (
    Rule(
        f"!{_LEARNS} || (has(self.dataset.train) && self.dataset.train.size() > 0)",
        "give rows to learn from; only a job with training.maxSteps: 0 does without, and answers dataset.validation",
        field_path=".dataset.train",
    ),
    Rule(
        f"{_LEARNS} || has(self.evaluation)",
        "give evaluation: {} with training.maxSteps: 0: a job that learns nothing is there to answer",
        field_path=".evaluation",
    ),
    Rule(
        f"{_LEARNS} || !has(self.evaluation) || !self.evaluation.atStart",
        "must be false with training.maxSteps: 0: the model that begins is the one that ends",
        field_path=".evaluation.atStart",
    ),
    Rule(
        f"{_LEARNS} || self.method == 'sft'",
        "must be sft with training.maxSteps: 0: nothing is learnt, so no other method's rows, rewards or judges are read",
        field_path=".method",
    ),
    Rule(
        f"{_LEARNS} || !has(self.model.scratch)",
        "give model.from with training.maxSteps: 0: random weights have no answers",
        field_path=".model.scratch",
    ),
    Rule(
        f"{_LEARNS} || !has(self.model.newTokens) || size(self.model.newTokens) == 0",
        "leave it out with training.maxSteps: 0: nobody teaches the model new tokens",
        field_path=".model.newTokens",
    ),
    Rule(
        f"{_LEARNS} || !has(self.model.quantization) || has(self.tuner.continueFrom)",
        "leave it out with training.maxSteps: 0, or name an adapter in tuner.continueFrom: the trainer's libraries take "
        "quantised weights with an adapter alone",
        field_path=".model.quantization",
    ),
    Rule(
        f"{_LEARNS} || self.distributed.strategy in ['auto', 'ddp', 'deviceMap']",
        "must be auto, ddp or deviceMap with training.maxSteps: 0: the others split weights for their optimiser",
        field_path=".distributed.strategy",
    ),
    Rule(
        f"{_LEARNS} || {_STREAMED}",
        "remove it with training.maxSteps: 0, and name the rows in dataset.validation: no row is read to learn from",
        field_path=".dataset.streaming",
    ),
    Rule(
        f"{_LEARNS} || (!has(self.training.earlyStopping) && !self.training.evaluateAtStart)",
        "leave earlyStopping and evaluateAtStart out with maxSteps: 0: no loss is measured",
        field_path=".training",
    ),
    Rule(
        "!has(self.dataset.validationSplit) || (has(self.dataset.train) && self.dataset.train.size() > 0)",
        "give the rows to split in dataset.train, or name whole sources in dataset.validation",
        field_path=".dataset.validationSplit",
    ),
)
"""A job that learns nothing, and answers."""

EVALUATION = (
    Rule(
        f"!has(self.evaluation) || {_VALIDATED}",
        "needs rows to answer: give dataset.validation or dataset.validationSplit",
        field_path=".evaluation",
    ),
    Rule(
        f"!has(self.evaluation) || !({_HEADS})",
        "remove it: this method's model gives numbers and writes no answers; training.evalSteps tells how well it does",
        field_path=".evaluation",
    ),
    Rule(
        "!has(self.evaluation) || !has(self.evaluation.metrics) || "
        "self.evaluation.metrics.all(each, self.evaluation.metrics.exists_one(other, other == each))",
        "names a metric twice: name it once",
        field_path=".evaluation.metrics",
    ),
)
"""Answers to the validation rows."""

COMBINATIONS = (
    *SCRATCH,
    *TUNER,
    *TRAINING,
    *DATA,
    *PACKING,
    *PREFERENCE,
    *STREAMING,
    *MULTIMODAL,
    *ROLLOUT,
    *ENGINE,
    *HEADS,
    *QUANTIZED,
    *PARALLEL,
    *SEQUENCE,
    *PRECISION,
    *EVALUATION,
    *INFERENCE,
)
"""All rows, in the order in which they are told."""
