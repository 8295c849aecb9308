"""A look at everything that the operator must not read, before an accelerator is held.

    python -m trimtab_trainer.preflight

Sources open, rows are sound, the model's files fit each other, the output can be written. Neither torch nor
transformers is imported for that: it takes about a second on modest data. Rows that take long to tokenise are tokenised
here as well, and kept for the run.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import trimtab_store as store
from trimtab_api import inputs, memory
from trimtab_api.conditions import Reason
from trimtab_api.contract import CodeInput, DataInput, Ending, Exit, ModelInput, RunConfig
from trimtab_api.inputs import SAME_VOCABULARY
from trimtab_api.v1alpha1.model import Scratch
from trimtab_api.v1alpha1.progress import Memory
from trimtab_api.v1alpha1.status import PinnedInput
from trimtab_trainer import strategies, workplace
from trimtab_trainer.data import collecting, streaming
from trimtab_trainer.data.boxes import Boxes
from trimtab_trainer.data.collecting import Collected, rows_of
from trimtab_trainer.data.feeds import Feed, open_feed
from trimtab_trainer.data.masks import render_row
from trimtab_trainer.data.media import see_alike, see_unpacked
from trimtab_trainer.data.opened import Media, Named, gather, named
from trimtab_trainer.data.preference import sides
from trimtab_trainer.data.reading import Skipped, strictly
from trimtab_trainer.data.rows import COLUMNS, IMAGES, Row, shown
from trimtab_trainer.endings import Fault, ending_of
from trimtab_trainer.evaluation import questions
from trimtab_trainer.inputs import (
    ADAPTER_CONFIG,
    SMALL_MODEL_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    LocalData,
    LocalModel,
    Pins,
    fetch_beginning,
    fetch_model,
    read_code,
    uses_hub,
)
from trimtab_trainer.measuring import Measured, measure
from trimtab_trainer.methods import needs_of
from trimtab_trainer.model import quantisation
from trimtab_trainer.model.adapter import see_base
from trimtab_trainer.model.chat import CHATML_TOKENS
from trimtab_trainer.model.loading import architecture, see_same_vocabulary
from trimtab_trainer.model.scalar import see_one_output
from trimtab_trainer.model.vision import model_type, see_senses
from trimtab_trainer.output import open_output
from trimtab_trainer.strategies.layers import see_splittable
from trimtab_trainer.strategies.shareable import see_shareable
from trimtab_trainer.template import CHATML, ChatTemplate, asked_for, special_tokens_in, template_in

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a storage may take to answer: a later look is cheaper than a long one."""
WHOLE_UP_TO = 1 << 30
"""Largest source in object storage that is looked at as a whole, in bytes."""
FIRST_LINES = 20_000
"""Lines of each text file of a larger one."""
RENDERED_ROWS = 2000
"""Rows that are rendered where no tokenizer is at hand."""
COUNTED_ROWS = 20_000
"""Rows that are rendered and counted in tokens where one is."""

OPENED = {"image": 200, "video": 20, "audio": 20}
"""Images, videos and sounds that are fetched and opened."""


TOKENISED_FROM = 8 << 20
"""Bytes of rows from which on the run shall not tokenise them while it holds accelerators."""


def look(config: RunConfig, work: Path) -> Ending:
    """Look at all inputs, and tokenise the rows when they are many.

    Raises what `check` and the run's own preparation raise.
    """
    ending = check(config, work)
    if config.model is None or config.spec.dataset.streaming is not None or not config.spec.learns:
        return ending
    if (work / "rows" / collecting.ALL).stat().st_size >= TOKENISED_FROM:
        from trimtab_trainer.distributed import Group, Place
        from trimtab_trainer.notice import Notice
        from trimtab_trainer.progress import Silent
        from trimtab_trainer.run import Run

        alone = Group(Place(rank=0, local_rank=0, world=1, local_world=1), 1, timeout_seconds=60)
        Run(config, alone, work, Notice(), Silent()).tokenise()
    return ending


def check(config: RunConfig, work: Path) -> Ending:
    """Look at all inputs.

    Raises Fault and the store's errors for the first thing that is wrong.
    """
    strategies.see_possible(config)
    open_output(config.output, patience=PATIENCE).probe()
    pins = Pins(config.pins)
    code = [_code(each, pins) for each in config.code]
    streamed = config.spec.dataset.streaming is not None
    feeds = [open_feed(source, pins, PATIENCE) for source in config.train] if streamed else []
    parts = [] if streamed else config.train
    train = [_data(source, work / f"train-{i}", pins) for i, source in enumerate(parts)]
    held = [_data(source, work / f"held-{i}", pins) for i, source in enumerate(config.validation)]
    needs = needs_of(config)
    if streamed:
        (work / "rows").mkdir(parents=True)
        collected = streaming.beginning(feeds, held, config.spec.dataset, needs, work / "rows")
    else:
        collected = collecting.collect(train, held, config.spec.dataset, needs, work / "rows")
    whole = not streamed and all(each.whole for each in (*train, *held))
    models = [source for source in (config.model, config.tokenizer, *config.further) if source]
    local = [_model(source, config, work / f"model-{i}", pins) for i, source in enumerate(models)]
    _adapters(config, models, local)
    if config.spec.model.scratch is not None:
        _scratch(config.spec.model.scratch)
    folder = local[0].path if local else None
    for source, each in zip(models, local, strict=True):
        if source.field in SAME_VOCABULARY and folder is not None:
            see_same_vocabulary(folder, each.path, source.field, each.reference)
    measured = _rows(config, collected, folder)
    needed = _memory(config, local[0].path if config.model is not None else None)
    _media(collected, config, folder, work / "media")
    questions.see(collected, config)
    rows = collected.rows if config.spec.learns else collected.validation_rows
    found = [
        PinnedInput(field=source.field, uri=each.reference, digest=each.digest)
        for source, each in zip(models, local, strict=True)
    ]
    return Ending(
        reason=Reason.INPUTS_SOUND,
        message=f"{rows} rows are sound"
        + ("" if measured is None else measured.told(collected.rows, config.resolved.truncation))
        + (f" beside their {_shown(collected)}" if measured is not None and collected.shown else "")
        + ("" if whole else "; the rest is checked when the training starts")
        + collected.remark,
        pins=[*found, *code, *map(_pin, train), *map(_pin, feeds), *map(_pin, held)],
        rows=rows if whole else None,
        dataset_digest=collected.digest if whole else None,
        memory=needed,
    )


def _data(source: DataInput, into: Path, pins: Pins) -> LocalData:
    return fetch_beginning(source, into, pins, limit=WHOLE_UP_TO, lines=FIRST_LINES, patience=PATIENCE)


def _pin(data: LocalData | Feed) -> PinnedInput:
    return PinnedInput(field=data.source.field, uri=data.display[:1100], digest=data.digest)


def _code(source: CodeInput, pins: Pins) -> PinnedInput:
    """The file is there, and what it was; that it holds what is asked of it, whoever calls it looks for."""
    return PinnedInput(field=source.field, uri=source.reference, digest=read_code(source, pins).digest)


def _adapters(config: RunConfig, models: list[ModelInput], local: list[LocalModel]) -> None:
    """Adapters to start from stand on the base of this job."""
    for source, each in zip(models, local, strict=True):
        if _is_adapter(source, config):
            see_base(each, local[0], source.field)


def _memory(config: RunConfig, base: Path | None) -> Memory | None:
    """What the training takes on one device; None without any, or for an architecture whose sizes are not known.

    Raises Fault(MemoryTooSmall) when it is known how much there is, and the run cannot fit it.
    """
    shape = _shape(config, base)
    if shape is None or not config.spec.learns:
        return None
    way = memory.way_of(config.spec, config.resolved, shape)
    available = _available(config, way.accelerated)
    if available is not None and (short := memory.shortage(shape, way, available)) is not None:
        raise Fault(Reason.MEMORY_TOO_SMALL, *short)
    return memory.estimate(shape, way).model_copy(update={"available_bytes": available})


def _shape(config: RunConfig, base: Path | None) -> memory.Shape | None:
    if base is not None:
        return memory.shape_of(json.loads((base / "config.json").read_bytes()))
    scratch = config.spec.model.scratch
    if scratch is None or scratch.tokenizer.train is None or scratch.extra is not None:
        return None
    return memory.shape_from_scratch(scratch, scratch.tokenizer.train.vocab_size)


def _available(config: RunConfig, accelerated: bool) -> int | None:
    """Bytes of one device, or of main memory for each process."""
    if accelerated:
        device = config.spec.distributed.device_memory
        return None if device is None else int(quantity(device))
    limit = config.spec.pod.resources.limits.get("memory")
    return None if limit is None else int(quantity(limit) / config.resolved.processes_per_node)


def _is_adapter(source: ModelInput, config: RunConfig) -> bool:
    return any(each.field == source.field for each in inputs.adapters(config.spec))


def _model(source: ModelInput, config: RunConfig, into: Path, pins: Pins) -> LocalModel:
    if _is_adapter(source, config):
        if source.s3 is not None:
            _weights(source, config)
        return fetch_model(source, into, pins, only=SMALL_MODEL_FILES, patience=PATIENCE)
    whole = source is not config.tokenizer
    if whole and source.s3 is not None:
        _weights(source, config)
    local = fetch_model(source, into, pins, only=SMALL_MODEL_FILES if whole else TOKENIZER_FILES, patience=PATIENCE)
    if inputs.gives_rewards(source.field) and (local.path / ADAPTER_CONFIG).is_file():
        return local
    if whole:
        _described(source, config, local)
    if not (local.path / "tokenizer.json").is_file():
        hint = "Convert the tokenizer to tokenizer.json with transformers and publish it there."
        raise Fault(Reason.MODEL_INVALID, f"{source.field} {local.reference}: no tokenizer.json there", hint)
    return local


def _described(source: ModelInput, config: RunConfig, local: LocalModel) -> None:
    """What config.json says of a whole model fits what is asked of it."""
    described = architecture(local.path, source.field, local.reference)
    if inputs.gives_rewards(source.field):
        see_one_output(described, source.field, local.reference)
    if source.path is not None and not any(local.path.glob("*.safetensors")):
        raise _no_weights(source, local.reference)
    new = 0
    if source is config.model:
        quantisation.see_trainable(described, config, source.field, local.reference)
        parallel = config.spec.distributed.parallel
        if parallel.sequence > 1:
            see_shareable(described, parallel.sequence, config.spec.dataset.max_length)
        if parallel.tensor > 1 or parallel.expert > 1:
            see_splittable(described, config)
        new = 0 if config.resolved.tuner_type == "full" else len(config.spec.model.new_tokens)
    _vocabulary(source, local, described.get("vocab_size"), new)


def _weights(source: ModelInput, config: RunConfig) -> None:
    """The weights are looked for, not fetched; and the pods' disk must hold them."""
    assert source.s3 is not None
    with store.connect(source.s3.connection, patience=PATIENCE) as s3:
        identity = store.identify(s3, source.s3.uri)
    names = [Path(name).name for name in identity.files]
    if "adapter_config.json" not in names and not any(fnmatch.fnmatch(name, WEIGHT_FILES[0]) for name in names):
        raise _no_weights(source, source.s3.uri)
    limit = config.spec.pod.resources.limits.get("ephemeral-storage")
    room = None if limit is None else quantity(limit)
    # The weights themselves, and with full tuning a checkpoint of them in float32 with two moments.
    needed = identity.size * (7 if config.resolved.tuner_type == "full" and config.spec.learns else 1.2)
    if room is not None and needed > room:
        raise Fault(
            Reason.DISK_FULL,
            f"about {needed / 2**30:.1f} GiB of scratch space are needed, pod.resources.limits allow {limit}",
            "Raise ephemeral-storage in pod.resources.limits.",
        )


def _no_weights(source: ModelInput, reference: str) -> Fault:
    hint = "Save the weights as safetensors; pickled ones are never opened, because that can run code."
    return Fault(Reason.UNSAFE_FORMAT, f"{source.field} {reference}: no *.safetensors there", hint)


def _vocabulary(source: ModelInput, local: LocalModel, size: object, new: int) -> None:
    """The tokenizer's tokens have rows in the embeddings, and so have the new ones that an adapter brings."""
    import tokenizers

    path = local.path / "tokenizer.json"
    if not (isinstance(size, int) and path.is_file()):
        return
    known = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size(with_added_tokens=True)
    if known > size:
        raise Fault(
            Reason.MODEL_INVALID,
            f"{source.field} {local.reference}: the tokenizer has {known} tokens, the model embeddings for {size}",
            "Publish the model with the tokenizer that it was trained with.",
        )
    if known + new > size:
        raise Fault(
            Reason.SPEC_INVALID,
            f"model.newTokens: {known + new} tokens do not fit the {size} rows of the base's embeddings",
            "Set tuner.type: full, which lets the embeddings grow, or tune a base that has room.",
        )


def _scratch(scratch: Scratch) -> None:
    if scratch.extra is not None:
        try:
            parsed = json.loads(scratch.extra)
        except json.JSONDecodeError as error:
            problem = f"model.scratch.extra: not JSON: {error.msg} at column {error.colno}"
            raise Fault(Reason.SPEC_INVALID, problem, "Write one JSON object.") from error
        if not isinstance(parsed, dict):
            raise Fault(Reason.SPEC_INVALID, "model.scratch.extra: must be a JSON object", "Write one JSON object.")
    known = architectures()
    if known and scratch.model_type not in known:
        problem = f"model.scratch.modelType: transformers knows no {scratch.model_type!r}"
        raise Fault(Reason.SPEC_INVALID, problem, "Name a model_type of transformers, for example llama.")


def architectures() -> set[str]:
    """The architectures that the installed transformers knows, read from its table without importing it."""
    spec = importlib.util.find_spec("transformers")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    table = Path(folders[0]) / "models" / "auto" / "auto_mappings.py" if folders else None
    if table is None or not table.is_file():
        return set()
    return set(runpy.run_path(str(table)).get("CONFIG_MAPPING_NAMES", {}))


def _rows(config: RunConfig, collected: Collected, folder: Path | None) -> Measured | None:
    """Render the first rows as the training will; where a tokenizer is there, count them, and see that some fit."""
    asked = config.spec.template
    source = asked_for(asked)
    own = CHATML if folder is None else template_in(folder)
    render = None
    if collected.conversations or own is not None or source is not None:
        special = CHATML_TOKENS if folder is None else special_tokens_in(folder)
        render = ChatTemplate.of(own, source, asked.system, special, asked.enable_thinking).renderer()
    spoiled = strictly if config.spec.dataset.strict else Skipped()
    texts: list[str] = []
    read = 0
    for read, row in enumerate(rows_of(collected.train), start=1):
        if read > (RENDERED_ROWS if folder is None else COUNTED_ROWS):
            break
        try:
            texts += [render_row(side, render, config.resolved.loss)[0] for side in sides(row)]
        except Fault as fault:
            spoiled(fault)
    if folder is None or not texts:
        return None
    measured = measure(texts, folder, config.spec.dataset.max_length)
    if measured.longer == measured.texts and read == collected.rows and config.resolved.truncation == "delete":
        raise Fault(
            Reason.DATA_EMPTY,
            f"all {read} rows are longer than dataset.maxLength {config.spec.dataset.max_length} and would be deleted",
            "Raise dataset.maxLength, or set dataset.truncation to left or right.",
        )
    return measured


def _media(collected: Collected, config: RunConfig, folder: Path | None, into: Path) -> None:
    """Open the first of what rows show, and see that the model takes any."""
    if not collected.shown:
        return
    see_senses(folder, collected.shown)
    assert folder is not None, "a model that is not there has no senses"
    see_unpacked(config.spec.dataset)
    strategy = strategies.of(config)
    if strategy.splits_weights and config.resolved.world_size > 1:
        files = [path for path in (collected.train, collected.validation) if path is not None]
        see_alike((row for path in files for row in rows_of(path)), collected.shown, strategy.name)
    media = gather(_first(collected), collected.roots, into)
    # What a model sees of an image is its processor's to say; whether a box lies on it is seen without.
    boxes = Boxes(model_type(folder), media.size, lambda size: size)
    for row in rows_of(collected.train):
        if IMAGES in row and not _known(row, media):
            return
        boxes(row)


def _shown(collected: Collected) -> str:
    """What rows show, which only the model's processor counts in tokens."""
    return ", ".join(COLUMNS[kind] for kind in sorted(collected.shown))


def _first(collected: Collected) -> Iterator[Named]:
    left = dict(OPENED)
    held = () if collected.validation is None else named(collected.validation, "validation")
    for each in chain(named(collected.train, "training"), held):
        if left[each.kind] > 0:
            left[each.kind] -= 1
            yield each
        if not any(left[kind] for kind in collected.shown):
            return


def _known(row: Row, media: Media) -> bool:
    return all(each in media.index for each in shown(row) if each[0] == "image")


_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def quantity(amount: int | str) -> float:
    """An amount as Kubernetes writes it, as a number: 16Gi, 500m, 2."""
    text = str(amount)
    if text[-2:] in _BINARY:
        return float(text[:-2]) * _BINARY[text[-2:]]
    if text[-1:] in _UNITS:
        return float(text[:-1]) * _UNITS[text[-1:]]
    return float(text)


def main() -> int:
    """Check, write the termination message, print it, return the table's code."""
    workplace.log_to_stderr()
    try:
        config = RunConfig.model_validate_json(workplace.run_file().read_text())
        workplace.prepare(workplace.work_root(), hub=uses_hub(config))
        work = Path(tempfile.mkdtemp(prefix="preflight-", dir=workplace.work_root()))
        try:
            code, ending = Exit.OK, look(config, work)
        finally:
            shutil.rmtree(work)
    except Exception as error:  # noqa: BLE001 - the last door: whatever it is, the message must be written
        code, ending = ending_of(error)
    workplace.termination_log().write_text(ending.text())
    sys.stdout.write(ending.text() + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
