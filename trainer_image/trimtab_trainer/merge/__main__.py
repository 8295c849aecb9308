"""`python -m trimtab_trainer.merge`: the pod of a MergeJob, or a merge of local folders without a cluster."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from trimtab_api import contract
from trimtab_api.conditions import Reason
from trimtab_api.contract import Ending, Exit, MergeConfig, ProgressReport
from trimtab_api.v1alpha1.mergejob import MergeProgress
from trimtab_api.v1alpha1.status import Artifact
from trimtab_trainer import workplace
from trimtab_trainer.endings import Fault, ending_of
from trimtab_trainer.imports import UNUSED_BY_MERGES, leave_out
from trimtab_trainer.progress import ConfigMapReporter, Reporter, Silent

if TYPE_CHECKING:
    from trimtab_trainer.merge.job import Outcome
    from trimtab_trainer.merge.writing import Report

log = logging.getLogger(__name__)

MERGE_FILE = "TRIMTAB_MERGE_FILE"
"""Overrides contract.MERGE_FILE."""


def main(arguments: list[str] | None = None) -> int:
    """Merge, and say how it ended. Returns the exit code of contract.Exit."""
    options = _options(arguments)
    workplace.log_to_stderr()
    signal.signal(signal.SIGTERM, _leave)
    if options.base is not None or options.adapter:
        return _by_hand(options)
    code, ending = _in_pod(Path(options.config))
    try:
        workplace.termination_log().write_text(ending.text())
    except OSError as error:
        log.warning("no termination message: %s", error)
    return int(code)


def _in_pod(path: Path) -> tuple[Exit, Ending]:
    try:
        config = MergeConfig.model_validate_json(path.read_bytes())
        models = [config.base, *(each.source for each in config.adapters)]
        hub = any(source.hugging_face for source in [*models, config.calibration] if source)
        work = workplace.work_root()
        # Whether the base is on the hub may stand in the adapter alone.
        workplace.prepare(work, hub=bool(hub) or config.base is None)
        return Exit.OK, _merged(config, work / "merge")
    except Exception as error:  # noqa: BLE001 - the table of endings is the one place that knows them all
        code, ending = ending_of(error)
        log.error("%s; %s", ending.message, ending.hint)
        return code, ending


def _merged(config: MergeConfig, work: Path) -> Ending:
    work.mkdir(parents=True, exist_ok=True)
    reporter: Reporter = Silent()
    if config.progress_config_map is not None:
        reporter = ConfigMapReporter(config.job.namespace, config.progress_config_map)

    def report(done: int, total: int) -> None:
        merge = MergeProgress(shard=done, total_shards=total, shards=f"{done}/{total}")
        reporter.report(ProgressReport(attempt=0, merge=merge))

    try:
        outcome = _outcome(config, work, report)
    finally:
        reporter.close()
    manifest = outcome.manifest
    artifact = Artifact(uri=outcome.uri, digest=manifest.digest, kind="model", size_bytes=manifest.size)
    return Ending(reason=Reason.SUCCEEDED, message=f"published {outcome.uri}", artifact=artifact, pins=outcome.pins)


def _outcome(config: MergeConfig, work: Path, report: Report) -> Outcome:
    if config.spec.quantize is not None:
        from trimtab_trainer.export.job import run as export

        return export(config, work, report)
    leave_out(UNUSED_BY_MERGES)
    from trimtab_trainer.merge.job import run

    return run(config, work, report)


def _by_hand(options: argparse.Namespace) -> int:
    leave_out(UNUSED_BY_MERGES)
    from trimtab_trainer.merge.job import merge

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} files", file=sys.stderr)  # noqa: T201 - a person reads it

    try:
        adapters = [_weighted(text) for text in options.adapter]
        if options.base is None or not adapters or options.output is None:
            raise Fault(Reason.SPEC_INVALID, "--base, --adapter and --output belong together", "Give all three.")
        outcome = merge(
            Path(options.base),
            adapters,
            Path(options.output),
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            check=not options.no_verify,
            tolerance=options.tolerance,
            report=report,
        )
    except Exception as error:  # noqa: BLE001 - the table of endings is the one place that knows them all
        code, ending = ending_of(error)
        print(f"{ending.reason}: {ending.message}\n{ending.hint}", file=sys.stderr)  # noqa: T201 - a person reads it
        return int(code)
    print(f"{outcome.uri} {outcome.manifest.digest}")  # noqa: T201 - the result, for people and pipes
    return int(Exit.OK)


def _weighted(text: str) -> tuple[Path, float]:
    path, separator, weight = text.rpartition("=")
    if not separator:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise Fault(
            Reason.SPEC_INVALID, f"--adapter {text}: {weight!r} is no number", "Write DIR or DIR=WEIGHT."
        ) from error


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trimtab_trainer.merge", description=__doc__)
    parser.add_argument(
        "--config", default=os.environ.get(MERGE_FILE, contract.MERGE_FILE), help="merge.json of a MergeJob"
    )
    parser.add_argument("--base", help="folder of the base, for a merge without a cluster")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="DIR[=WEIGHT]", help="folder of an adapter; may be repeated"
    )
    parser.add_argument("--output", help="folder for the merged model; an unfinished merge in it is gone on with")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="largest file, such as 500MB or 4GB")
    parser.add_argument("--tolerance", type=float, help="largest difference of logits; default: what rounding explains")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits before publishing")
    return parser.parse_args(arguments)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise Fault(
        Reason.PREEMPTED, "the pod was told to leave; finished files are kept", "Nothing; the next pod goes on."
    )


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # The libraries of GPUs tidy up at a usual exit, whether they were used or not: that would be the peak of memory.
    os._exit(code)
