"""One run in one process, from run.json to an ending: the order of the rooms."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from trimtab_api import inputs, memory
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, RunConfig
from trimtab_api.v1alpha1.status import Artifact, Predictions
from trimtab_trainer import checkpoint, publish, report, stopping, strategies
from trimtab_trainer.arguments import precision, weight_dtype
from trimtab_trainer.data import collecting, kept, packing, sequences, streaming
from trimtab_trainer.data.boxes import Boxes
from trimtab_trainer.data.collecting import Collected, rows_of
from trimtab_trainer.data.feeds import open_feed
from trimtab_trainer.data.masks import Render
from trimtab_trainer.data.media import see_alike, see_unpacked
from trimtab_trainer.data.opened import Media, gather, named
from trimtab_trainer.data.reading import Skipped, strictly
from trimtab_trainer.data.seen import Seen, Standing, spacious
from trimtab_trainer.data.sequences import Encoder
from trimtab_trainer.distributed import Group, once, once_per_pod
from trimtab_trainer.endings import Fault, fault_of
from trimtab_trainer.evaluation import questions
from trimtab_trainer.evaluation.evaluator import AtStart, Evaluator, Surroundings
from trimtab_trainer.evaluation.untrained import untrained
from trimtab_trainer.inputs import MODEL_FILES, SMALL_MODEL_FILES, LocalModel, Pins, fetch_data, fetch_model
from trimtab_trainer.merge.lineage import fetch_with_base
from trimtab_trainer.methods import METHODS, Method, needs_of
from trimtab_trainer.methods.parts import Parts
from trimtab_trainer.methods.vision import sight_of, unsayable_of
from trimtab_trainer.model import (
    adapter,
    embeddings,
    loading,
    quantisation,
    scalar,
    scratch,
    senses,
    tokenizer,
    tuning,
    vision,
)
from trimtab_trainer.model.heads import Head, LanguageHead, ScalarHead, head_of
from trimtab_trainer.model.opening import open_model
from trimtab_trainer.movement import Movement
from trimtab_trainer.notice import Notice
from trimtab_trainer.output import Output, open_output
from trimtab_trainer.output import publish as upload_whole
from trimtab_trainer.preemption import StopTogether
from trimtab_trainer.progress import Reporter
from trimtab_trainer.strategies import gathering
from trimtab_trainer.strategies.layers import Layers, see_split
from trimtab_trainer.template import ChatTemplate, asked_for
from trimtab_trainer.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that stands before the first step."""

    collected: Collected
    base: LocalModel | None
    tokenizer: Any
    template: ChatTemplate | None
    stops: list[int]
    train: Path
    validation: Path | None
    sequences_digest: str
    stream: streaming.Stream | None
    """This process's records when they are read while the training runs; train holds the first of them then."""
    further: dict[str, LocalModel]
    """The models beside the tuned one, by field."""
    new_tokens: list[int]
    """Ids of the tokens that the tokenizer was given."""
    processor: Any = None
    """Of a model with senses."""
    media: Media | None = None
    """What rows show."""
    questions: Path | None = None
    """The validation rows as the evaluation asks them; None when it is not asked for."""

    @property
    def dataset_digest(self) -> str:
        """Identity of what is learnt from: rows, and the contents of what they show."""
        if self.media is None:
            return self.collected.digest
        return "sha256:" + hashlib.sha256(f"{self.collected.digest} {self.media.digest}".encode()).hexdigest()


class Run:
    """One process of a run."""

    def __init__(self, config: RunConfig, group: Group, work: Path, notice: Notice, reporter: Reporter):
        self.config = config
        self.group = group
        self.work = work
        self.notice = notice
        self.reporter = reporter
        self.method: Method = METHODS[config.spec.method]
        self.head: Head = head_of(config.spec)
        self.strategy = strategies.of(config)
        self.output: Output = open_output(config.output)
        self.step = 0
        """Last step that is known to be done."""
        self.from_step = 0
        """Step that the run went on from."""
        self.speeds: list[float] = []
        """Tokens per second between two log lines."""

    def __call__(self) -> Ending:
        """Train to the end and publish.

        Raises Fault(Preempted) after a common step was saved; every other Fault says what went wrong.
        """
        work = self.work / "run"
        # What an earlier process left here may be half of anything.
        once_per_pod(self.group, lambda: shutil.rmtree(work, ignore_errors=True))
        prepared = self._prepare(work)
        if not self.config.spec.learns:
            return self._answer(prepared, work)
        resume = checkpoint.find(self.output, self.group, work / "resume", prepared.sequences_digest, self.strategy)
        self.from_step = self.step = resume.step if resume else 0
        if self.group.any(self.notice.given):
            raise Fault(Reason.PREEMPTED, f"told to leave before a step was done; step {self.step} is saved")
        self.strategy.prepare()
        tuned = self._tuned(prepared, work)
        movement = Movement(tuned.model)
        trainer, stop, evaluator = self._trainer(tuned.model, prepared, resume, work)
        over = resume is not None and stopping.is_over(self.config.spec.training.early_stopping, resume.path)
        if resume is None or not (resume.finished or over):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.path))
        else:
            trainer.state = trainer.state.load_from_json(str(resume.path / "trainer_state.json"))
            self.strategy.go_on(trainer, str(resume.path), trainer.state.max_steps)
        self.step = int(trainer.state.global_step)
        if stop.stopped and self.step < trainer.state.max_steps:
            raise Fault(
                Reason.PREEMPTED,
                f"told to leave; step {self.step} of {trainer.state.max_steps} is saved",
                step=self.step,
            )
        if self.step > 1:
            movement.see(trainer.model)
        once(self.group, lambda: self._report(trainer, prepared, work))
        artifact, model = self._publish(trainer, prepared, tuned, work)
        predictions = None
        if evaluator is not None:
            predictions = self._evaluate(evaluator, model, artifact)
            once(self.group, lambda: self._report(trainer, prepared, work))
        return self._ending(artifact, predictions, prepared)

    def tokenise(self) -> None:
        """Tokenise the rows and keep them, so that the run itself fetches them: no weight is opened.

        Raises Fault and the store's errors for what is wrong with rows, tokenizer and template.
        """
        self._prepare(self.work / "run", rows_alone=True)

    def _prepare(self, work: Path, rows_alone: bool = False) -> Prepared:
        group, config = self.group, self.config
        pins = Pins(config.pins)
        collected = once_per_pod(group, lambda: self._collect(work / "data", pins))
        base = self._base(work / "model", pins, SMALL_MODEL_FILES if rows_alone else MODEL_FILES)
        folder = base.path if base is not None else self._scratch_tokenizer(collected, work / "tokenizer", pins)
        loaded = tokenizer.load(folder, "model.from" if base else "model.scratch.tokenizer")
        new_tokens = embeddings.extend(loaded, config.spec.model.new_tokens)
        template = self._template(loaded, needed=collected.conversations)
        stops = tokenizer.stop_ids(loaded, template, config.spec.template, _known_stops(folder))
        render = None if template is None else template.renderer()
        media = self._media(collected, work / "media")
        processor: Any = None
        vision.see_senses(folder, collected.shown)
        if vision.senses(folder):
            processor = vision.load_processor(folder, loaded, "model.from")
            senses.settle(processor, config.spec.dataset.multimodal)
        standing = None if media is None else self._standing(media, processor)

        def encoder() -> Encoder:
            if standing is None or render is None:
                return self.method.encoder(config, loaded, render)
            plain = self.method.encoder(config, loaded, spacious(render, standing))
            boxes = Boxes(vision.model_type(folder), standing.media.size, partial(vision.resized, processor))
            return Seen(plain, standing, boxes)

        def tokenise(into: Path) -> str:
            skipped = Skipped()
            spoiled = strictly if config.spec.dataset.strict else skipped
            count = sequences.write(collected.train, encoder(), into / kept.TRAIN, spoiled)
            if collected.validation is not None:
                sequences.write(collected.validation, encoder(), into / kept.VALIDATION, spoiled)
            if skipped.rows:
                log.warning("%d rows were passed over, the first because %s", skipped.rows, skipped.first)
            log.info("%d sequences of %d tokens, %d of them learnt", count.sequences, count.tokens, count.learnt)
            whole = f"{count.digest} {collected.digest}" if config.spec.dataset.streaming else count.digest
            return self._packed(into / kept.TRAIN, whole)

        made_of = kept.Ingredients(
            rows=collected.digest if media is None else f"{collected.digest} {media.digest}",
            tokenizer=folder,
            template=None if template is None else template.source,
            software=publish.versions(),
        )
        key = made_of.key(config)
        if len(set(group.all_of(key))) > 1:
            raise Fault(Reason.INPUT_CHANGED, "the pods read different rows", "Start the job again.")
        rows, digest = self._tokenised(key, tokenise, work / "sequences")
        return Prepared(
            collected=collected,
            base=base,
            tokenizer=loaded,
            template=template,
            stops=stops,
            train=rows / kept.TRAIN,
            validation=None if collected.validation is None else rows / kept.VALIDATION,
            sequences_digest=f"sha256:{digest}",
            stream=self._stream(loaded, render, pins),
            further={} if rows_alone else self._further(work / "further", pins),
            new_tokens=new_tokens,
            processor=processor,
            media=media,
            questions=self._questions(collected, loaded, render, stops, standing, work / "questions.jsonl"),
        )

    def _questions(
        self,
        collected: Collected,
        loaded: Any,
        render: Render | None,
        stops: list[int],
        standing: Standing | None,
        into: Path,
    ) -> Path | None:
        config = self.config
        if config.spec.evaluation is None:
            return None
        once_per_pod(self.group, lambda: questions.write(collected, config, loaded, render, stops, into, standing))
        return into

    def _tokenised(self, key: str, tokenise: kept.Make, into: Path) -> tuple[Path, str]:
        """The folder of tokenised rows, and what identifies them. Of a stream there is only the beginning: not kept.

        Where nothing is learnt, there are none.
        """
        if not self.config.spec.learns:
            return into, key
        if self.config.spec.dataset.streaming is None:
            place = kept.place(self.output.layout, self.config, key)
            return kept.obtain(self.group, self.output, place, tokenise, into, {"job": self.config.job.dump()})
        return once_per_pod(self.group, lambda: kept.anew(into, tokenise))

    def _media(self, collected: Collected, into: Path) -> Media | None:
        if not collected.shown:
            return None
        see_unpacked(self.config.spec.dataset)
        files = {"training": collected.train, "validation": collected.validation}
        if self.strategy.splits_weights and self.group.place.world > 1:
            rows = chain.from_iterable(rows_of(path) for path in files.values() if path is not None)
            see_alike(rows, collected.shown, self.strategy.name)
        wanted = chain.from_iterable(named(path, what) for what, path in files.items() if path is not None)
        return once_per_pod(self.group, lambda: gather(wanted, collected.roots, into))

    def _standing(self, media: Media, processor: Any) -> Standing:
        able = senses.Senses(processor)
        able.see_known(media.kinds)
        return Standing(media, able.placeholders, able.ids, able.text)

    def _packed(self, sequences: Path, digest: str) -> str:
        """Put packs in the place of sequences where the spec asks for it; returns what identifies them then."""
        dataset = self.config.spec.dataset
        if dataset.packing is None:
            return digest
        packs = sequences.with_name("packs.arrow")
        made = packing.pack(sequences, dataset, packs)
        packs.replace(sequences)
        log.info("%d packs, %.0f %% full", made.packs, made.filled * 100)
        return hashlib.sha256(f"{digest} {packing.settings(dataset)}".encode()).hexdigest()

    def _further(self, into: Path, pins: Pins) -> dict[str, LocalModel]:
        found = {}
        on_the_base = {each.field for each in inputs.adapters(self.config.spec)}
        for number, source in enumerate(self.config.further):
            fetch = fetch_model if source.field in on_the_base else fetch_with_base
            found[source.field] = once_per_pod(self.group, partial(fetch, source, into / str(number), pins))
        return found

    def _collect(self, into: Path, pins: Pins) -> Collected:
        config = self.config
        held = [fetch_data(source, into / f"validation-{i}", pins) for i, source in enumerate(config.validation)]
        if config.spec.dataset.streaming is not None:
            feeds = [open_feed(source, pins) for source in config.train]
            into.mkdir(parents=True, exist_ok=True)
            return streaming.beginning(feeds, held, config.spec.dataset, self.method.needs(config), into)
        train = [fetch_data(source, into / f"train-{i}", pins) for i, source in enumerate(config.train)]
        return collecting.collect(train, held, config.spec.dataset, needs_of(config), into)

    def _stream(self, loaded: Any, render: Render | None, pins: Pins) -> streaming.Stream | None:
        dataset, place = self.config.spec.dataset, self.group.place
        if dataset.streaming is None:
            return None
        shared = self.config.spec.distributed.parallel.together
        feeds = [open_feed(source, pins) for source in self.config.train]
        encoder = self.method.encoder(self.config, loaded, render)
        needs = self.method.needs(self.config)
        return streaming.Stream(feeds, dataset, needs, encoder, place.rank // shared, place.world // shared)

    def _base(self, into: Path, pins: Pins, only: tuple[str, ...]) -> LocalModel | None:
        source = self.config.model
        return None if source is None else once_per_pod(self.group, lambda: fetch_model(source, into, pins, only))

    def _scratch_tokenizer(self, collected: Collected, into: Path, pins: Pins) -> Path:
        """The tokenizer of a model from scratch: one that is given, one learnt earlier, or one learnt now."""
        source, spec = self.config.tokenizer, self.config.spec
        if source is not None:
            return once_per_pod(self.group, lambda: fetch_model(source, into, pins, only=tokenizer.FILES).path)
        assert spec.model.scratch is not None
        assert spec.model.scratch.tokenizer.train is not None
        size = spec.model.scratch.tokenizer.train.vocab_size
        prefix = self.output.layout.tokenizer

        def learn() -> str:
            known = self.output.find(prefix)
            if known is None:
                folder = into.with_name("learnt")
                rows = rows_of(collected.train)
                tokenizer.learn(rows, size, asked_for(spec.template), spec.template.system, folder)
                made_by = {"job": self.config.job.dump(), "datasetDigest": collected.digest}
                known = upload_whole(self.output, folder, prefix, made_by)
                log.info("learnt a tokenizer: %s", known.digest[:19])
            return known.digest

        digest = once(self.group, learn)
        return once_per_pod(self.group, lambda: self.output.fetch(prefix, into, digest))

    def _template(self, loaded: Any, needed: bool) -> ChatTemplate | None:
        asked, own = self.config.spec.template, tokenizer.own_template(loaded)
        source = asked_for(asked)
        if not needed and own is None and source is None:
            return None
        special = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
        return ChatTemplate.of(own, source, asked.system, special, asked.enable_thinking)

    def _tuned(self, prepared: Prepared, work: Path) -> tuning.Tuned:
        made_by = self._provenance(prepared).made_by()

        def kept(make: Callable[[], dict[str, Any]]) -> Path:
            """An adapter's start: made by the first attempt and taken by each later one, or the base would move."""
            prefix, folder = self.output.layout.start, work / "start"

            def publish_once() -> str:
                known = self.output.find(prefix)
                if known is None:
                    adapter.write_tensors(make(), folder)
                    known = upload_whole(self.output, folder, prefix, made_by)
                return known.digest

            digest = once(self.group, publish_once)
            return once_per_pod(self.group, lambda: self.output.fetch(prefix, work / "start-fetched", digest))

        model = self._model(prepared)
        return tuning.tune(model, self.config, prepared.base, prepared.further, prepared.new_tokens, kept)

    def _model(self, prepared: Prepared) -> Any:
        spec = self.config.spec
        if prepared.base is None:
            assert spec.model.scratch is not None
            seed, stops = spec.training.seed, prepared.stops
            model = scratch.build(spec.model.scratch, prepared.tokenizer, stops, seed, self.head)
            return model.to(weight_dtype(self.config))
        described = loading.architecture(prepared.base.path, "model.from", prepared.base.reference)
        quantisation.see_trainable(described, self.config, "model.from", prepared.base.reference)
        pad, dtype = prepared.tokenizer.pad_token_id, weight_dtype(self.config)
        model = open_model(prepared.base, "model.from", dtype, self.head, spec.training.seed, pad, **self._loading())
        quantisation.keep_layout(model)
        if isinstance(self.strategy, Layers):
            see_split(model)
        whole = self.config.resolved.tuner_type == "full"
        embeddings.make_room(model, prepared.tokenizer, prepared.new_tokens, whole)
        loading.see_vocabulary(model, prepared.tokenizer, "model.from")
        if isinstance(self.head, LanguageHead):
            model.generation_config.eos_token_id = prepared.stops
            model.generation_config.pad_token_id = pad
        if prepared.processor is not None:
            vision.close_eyes(model)
        return model

    def _loading(self) -> dict[str, Any]:
        """How the weights are brought in: quantised, laid over devices, or as they are."""
        how = self.strategy.loading()
        quantization = self.config.spec.model.quantization
        if quantization is not None:
            arithmetic = precision(self.config)
            whole = scalar.HEADS if isinstance(self.head, ScalarHead) else ()
            how["quantization_config"] = quantisation.settings(
                quantization, arithmetic, self.strategy.splits_weights, whole
            )
        return how

    def _trainer(
        self, model: Any, prepared: Prepared, resume: checkpoint.Resume | None, work: Path
    ) -> tuple[Any, StopTogether, Evaluator | None]:
        from datasets import Dataset
        from transformers import PrinterCallback

        made_by = self._provenance(prepared).made_by()
        keep = self.config.spec.checkpoint.keep
        keeper = checkpoint.Keeper(self.output, self.group, keep, made_by, self.strategy)
        watch = Watch(self.reporter, self.group, keeper, self.config.attempt, self.from_step)
        stop, at_start = StopTogether(self.notice, self.group), AtStart()
        asked = self.config.spec.training.early_stopping
        early = [] if asked is None or prepared.validation is None else [stopping.StopEarly(asked)]
        validation = None if prepared.validation is None else Dataset.from_file(str(prepared.validation))
        trainer = self.method.trainer(
            Parts(
                config=self.config,
                group=self.group,
                model=model,
                tokenizer=prepared.tokenizer,
                template=prepared.template,
                stops=prepared.stops,
                train=Dataset.from_file(str(prepared.train)),
                validation=validation,
                folder=work / "checkpoints",
                callbacks=[*early, stop, keeper, at_start, watch],
                base=prepared.base,
                stream=prepared.stream,
                further=prepared.further,
                processor=prepared.processor,
                media=prepared.media,
            )
        )
        self.speeds = watch.speeds
        trainer.lora_plus_ratio = adapter.settings(self.config.spec).lora_plus_ratio
        trainer.remove_callback(PrinterCallback)
        keeper.trainer = watch.trainer = trainer
        evaluator = self._evaluator(trainer, prepared, watch, work)
        if evaluator is not None and self.config.spec.evaluation is not None and self.config.spec.evaluation.at_start:
            at_start.evaluator = evaluator
        # What was evaluated before the first step is in the history that a checkpoint brings.
        trainer.args.eval_on_start = trainer.args.eval_on_start and resume is None
        if resume is not None:
            keeper.window = resume.path / checkpoint.window_file(self.group.place.rank)
            keeper.complete = once(self.group, self.output.checkpoints)
        return trainer, stop, evaluator

    def _answer(self, prepared: Prepared, work: Path) -> Ending:
        """Let the model answer as it is. The answers are the artifact."""
        tuned = self._tuned(prepared, work)
        made_by = self._provenance(prepared).made_by()
        keeper = checkpoint.Keeper(self.output, self.group, self.config.spec.checkpoint.keep, made_by, self.strategy)
        watch = Watch(self.reporter, self.group, keeper, self.config.attempt, 0)
        trainer = untrained(self.config, tuned.model, work / "checkpoints", [watch])
        evaluator = self._evaluator(trainer, prepared, watch, work)
        assert evaluator is not None, "the rules ask for an evaluation where nothing is learnt"
        answered = evaluator(0, tuned.model)
        once(self.group, lambda: self._report(trainer, prepared, work))
        collected = prepared.collected
        return Ending(
            reason=Reason.SUCCEEDED,
            message=f"answered {answered.rows} rows{collected.remark}",
            from_step=0,
            step=0,
            artifact=Artifact(
                uri=answered.uri, digest=answered.digest, kind="predictions", dataset_digest=prepared.dataset_digest
            ),
            predictions=answered,
            rows=answered.rows,
            dataset_digest=prepared.dataset_digest,
        )

    def _evaluator(self, trainer: Any, prepared: Prepared, watch: Watch, work: Path) -> Evaluator | None:
        if prepared.questions is None:
            return None
        around = Surroundings(
            config=self.config,
            group=self.group,
            notice=self.notice,
            output=self.output,
            tokenizer=prepared.tokenizer,
            stops=prepared.stops,
            made_by=self._provenance(prepared).made_by(),
            folder=work / "predictions",
            splits_weights=self.strategy.splits_weights and self.group.place.world > 1,
            look=sight_of(prepared.processor, prepared.media),
            never=unsayable_of(prepared.processor, prepared.media),
        )
        return Evaluator(around, questions.read(prepared.questions), trainer, watch.answered)

    def _provenance(self, prepared: Prepared) -> publish.Provenance:
        return publish.Provenance(
            config=self.config,
            base=prepared.base,
            dataset_digest=prepared.dataset_digest,
            sequences_digest=prepared.sequences_digest,
            template=None if prepared.template is None else prepared.template.source,
            world=self.group.place.world,
            predictions=None if prepared.questions is None else self._below(self.output.layout.predictions(self.step)),
        )

    def _below(self, prefix: str) -> str:
        """A prefix of this run without the part that says where all of them are."""
        return prefix.removeprefix(f"{self.output.layout.prefix}/")

    def _facts(self, prepared: Prepared, model: Any) -> dict[str, str]:
        """What the page tells beside the curves."""
        spec, resolved = self.config.spec, self.config.resolved
        facts = {
            "method": f"{spec.method}, {resolved.tuner_type}",
            "base": "random weights" if prepared.base is None else prepared.base.reference,
            "steps": f"{self.step}, {resolved.global_batch_size} rows each",
            "rows": f"{prepared.collected.rows} to learn from",
            "processes": str(resolved.world_size),
            "peak memory": _peak(),
        }
        if self.speeds:
            facts["speed"] = f"{sorted(self.speeds)[len(self.speeds) // 2]:.0f} tokens per second (median)"
        shape = memory.shape_of(model.config.to_dict())
        if shape is not None and spec.learns:
            estimate = memory.estimate(shape, memory.way_of(spec, resolved, shape))
            facts["weights"] = f"{estimate.parameters:,}, {estimate.trainable_parameters:,} of them move"
            facts["estimated memory"] = memory.text(estimate.total_bytes)
        return facts

    def _publish(self, trainer: Any, prepared: Prepared, tuned: tuning.Tuned, work: Path) -> tuple[Artifact, Any]:
        """Seal the artifact. Returns it and, where answers are asked for, the model as whoever opens it finds it.

        None stands for the trainer's model, which nobody but all processes together holds.
        """
        import torch

        dtype = getattr(torch, precision(self.config))
        model = trainer.published()
        gathered = self._gathered(trainer, model, dtype) if self.strategy.splits_weights else None
        handed, folder, written = tuning.Tuned(model, tuned.terms), work / "artifact", None
        provenance = self._provenance(prepared)

        def publish_once() -> Artifact:
            nonlocal written
            written = publish.write(
                handed, prepared.tokenizer, prepared.stops, dtype, provenance, folder, prepared.processor, gathered
            )
            return publish.upload(self.output, folder, provenance)

        artifact = once(self.group, publish_once)
        if prepared.questions is None or self.strategy.splits_weights:
            return artifact, None
        fetched = None
        if tuned.terms:
            into = work / "published"
            fetched = once_per_pod(self.group, lambda: self.output.fetch(artifact.uri, into, artifact.digest))
        if self.group.place.first:
            return artifact, written
        return artifact, publish.follow(handed, dtype, self.config.resolved.tuner_type == "lora", fetched)

    def _evaluate(self, evaluator: Evaluator, model: Any, artifact: Artifact) -> Predictions:
        """Let the model answer. The artifact stands by now: whatever goes wrong says where it is."""
        try:
            return evaluator(self.step, model)
        except Exception as error:
            fault = fault_of(error)
            raise Fault(
                fault.reason,
                f"the evaluation ended after the {artifact.kind} was published as {artifact.uri}: {fault.message}",
                fault.hint,
                step=self.step,
            ) from error

    def _report(self, trainer: Any, prepared: Prepared, work: Path) -> None:
        about = report.About(
            title=f"{self.config.job.name}: {self.config.spec.method}",
            facts=self._facts(prepared, trainer.model),
            spec={"spec": self.config.spec.dump(), "resolved": self.config.resolved.dump()},
        )
        folder, prefix = work / "report", self.output.layout.report
        # TensorBoard would draw the events of an earlier report beside those of this one.
        shutil.rmtree(folder, ignore_errors=True)
        self.output.delete(prefix)
        report.write(trainer.state.log_history, about, folder)
        upload_whole(self.output, folder, prefix, self._provenance(prepared).made_by())

    def _ending(self, artifact: Artifact, predictions: Predictions | None, prepared: Prepared) -> Ending:
        collected = self._all_skipped(prepared)
        answered = "" if predictions is None else f", {predictions.rows} validation rows answered"
        return Ending(
            reason=Reason.SUCCEEDED,
            message=f"published {artifact.kind} after {self.step} steps{answered}{collected.remark}",
            from_step=self.from_step,
            step=self.step,
            artifact=artifact,
            predictions=predictions,
            rows=None if prepared.stream else collected.rows,
            dataset_digest=prepared.dataset_digest,
        )

    def _gathered(self, trainer: Any, model: Any, dtype: Any) -> dict[str, Any]:
        """What is published, on the first process, of weights that all processes hold in parts."""
        adapted = self.config.resolved.tuner_type != "full"
        if adapted:
            publish.see_split_effect(trainer.model_wrapped, model)
        return gathering.gather(model, self.group.place.first, trainable=adapted, dtype=None if adapted else dtype)

    def _all_skipped(self, prepared: Prepared) -> Collected:
        """What was collected, with the rows that every process's stream passed over."""
        if prepared.stream is None:
            return prepared.collected
        skipped = prepared.stream.skipped
        first = next((each for each in self.group.all_of(skipped.first) if each), prepared.collected.first_skipped)
        # Processes that work at one row read the same ones.
        total = self.group.total(skipped.rows) // self.config.spec.distributed.parallel.together
        return replace(prepared.collected, skipped=total, first_skipped=first)


def _peak() -> str:
    """The most memory that this process has held: of its device, or main memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return memory.text(torch.cuda.max_memory_allocated())
    return memory.text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _known_stops(folder: Path) -> list[int]:
    """The tokens that the model's own generation settings already end at."""
    import json

    path = folder / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return [found] if isinstance(found, int) else list(found or [])
