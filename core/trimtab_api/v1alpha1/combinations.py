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
        "!has(self.tuner.continueFrom) || size(self.model.newTokens) == 0",
        "leave it out: an adapter that goes on has no room for further tokens",
        field_path=".model.newTokens",
    ),
)
"""Tuners, models and methods."""

TRAINING = (
    Rule(
        "!has(self.training.earlyStopping) || size(self.dataset.validation) > 0 || has(self.dataset.validationSplit)",
        "needs validation rows: give dataset.validation or dataset.validationSplit",
        field_path=".training.earlyStopping",
    ),
    Rule(
        "!self.training.evaluateAtStart || size(self.dataset.validation) > 0 || has(self.dataset.validationSplit)",
        "needs rows to validate on: give dataset.validation or dataset.validationSplit",
        field_path=".training.evaluateAtStart",
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

PACKING = (
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

COMBINATIONS = (*SCRATCH, *TUNER, *TRAINING, *DATA, *PACKING)
"""All rows, in the order in which they are told."""
