"""Tokenizers: one that comes with a model, or a byte-level BPE learnt from the job's own rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import Template
from trimtab_trainer.data.masks import render_row
from trimtab_trainer.data.rows import Row
from trimtab_trainer.endings import Fault
from trimtab_trainer.inputs import TOKENIZER_FILES
from trimtab_trainer.model.chat import CHATML_TOKENS, END_OF_TEXT, SPECIAL, TURN_BEGINS, TURN_ENDS
from trimtab_trainer.template import CHATML, ChatTemplate

log = logging.getLogger(__name__)

FILES = TOKENIZER_FILES


def learn(rows: Iterable[Row], vocab_size: int, template: str | None, system: str | None, into: Path) -> None:
    """Learn a byte-level BPE from rows as they will be rendered, and write it in the transformers layout.

    The same rows give the same tokenizer. Text of special tokens is left out of the learning: it is one token anyway.
    """
    from transformers import PreTrainedTokenizerFast

    chat = ChatTemplate.of(CHATML, template, system, CHATML_TOKENS)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_texts(rows, chat), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_BEGINS, TURN_ENDS],
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = template or CHATML
    whole.save_pretrained(into)


def load(folder: Path, field: str) -> Any:
    """Load a tokenizer. Raises Fault(ModelInvalid) when it does not open or has no fast form, which masks need."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(Reason.MODEL_INVALID, f"{field}: the tokenizer does not open: {error}".splitlines()[0]) from error
    if not loaded.is_fast:
        hint = "Convert it to tokenizer.json with transformers and publish it with the model."
        raise Fault(Reason.MODEL_INVALID, f"{field}: the tokenizer has no tokenizer.json", hint)
    if loaded.pad_token_id is None:
        if loaded.eos_token_id is None:
            raise Fault(Reason.MODEL_INVALID, f"{field}: the tokenizer has neither a padding nor an end-of-text token")
        loaded.pad_token = loaded.eos_token
    return loaded


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template, the default one when it has several."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def stop_ids(tokenizer: Any, template: ChatTemplate | None, spec: Template, known: Iterable[int]) -> list[int]:
    """Ids of the tokens that end an answer: end of text, what ends the template's turns, what the spec adds.

    Raises Fault(SpecInvalid) for an asked token that is not one token of the vocabulary, and for a named template whose
    turns no token of the vocabulary ends.
    """
    found = [tokenizer.eos_token_id, *known]
    if template is not None:
        turn_end = _turn_end(tokenizer, template)
        found.append(turn_end)
        if turn_end is None and spec.name is not None:
            problem = f"template.name: {spec.name} ends an answer with what is not one token of this vocabulary"
            hint = "Add its turn marks with model.newTokens, or name a template whose marks the model knows."
            raise Fault(Reason.SPEC_INVALID, problem, hint)
        if turn_end is None and not spec.stop_tokens:
            log.warning(
                "the chat template ends an answer with no special token: set template.stopTokens, or it goes on"
            )
    vocabulary = tokenizer.get_vocab()
    for index, token in enumerate(spec.stop_tokens):
        if token not in vocabulary:
            hint = "Name a token of the vocabulary, for example the one that ends a turn in the chat template."
            raise Fault(Reason.SPEC_INVALID, f"template.stopTokens[{index}]: {token!r} is not one token", hint)
        found.append(vocabulary[token])
    return list(dict.fromkeys(each for each in found if each is not None))


def _turn_end(tokenizer: Any, template: ChatTemplate) -> int | None:
    """The special token that the template writes right after an answer."""
    conversation: Row = {
        "messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    }
    try:
        text, spans = render_row(conversation, template.renderer(), "lastTurn")
    except Fault:
        return None
    ids = tokenizer(text[slice(*spans[0])], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ids[-1] if ids and ids[-1] in special else None


def _texts(rows: Iterable[Row], chat: ChatTemplate) -> Iterator[str]:
    render = chat.renderer()
    apart = re.compile("|".join(re.escape(token) for token in SPECIAL))
    for row in rows:
        text, _ = render_row(row, render, "all")
        yield from (piece for piece in apart.split(text) if piece)
