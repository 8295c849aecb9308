"""One rank: `torchrun -m trimtab_trainer`. Reads run.json, trains, leaves its result for the launcher."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import partial

from trimtab_api.contract import Exit, RankResult, RunConfig
from trimtab_trainer import results, trackers, workplace
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.endings import ending_of
from trimtab_trainer.imports import leave_out, unused
from trimtab_trainer.inputs import uses_hub
from trimtab_trainer.notice import Notice
from trimtab_trainer.progress import ConfigMapReporter, MetricsReporter, Reporter, Several, Silent


def run_rank(config: RunConfig, place: Place, notice: Notice, reporter: Callable[[], Reporter]) -> RankResult:
    """Train as one process among `place.world`; whatever happens becomes a result."""
    # What libraries hold when they are loaded, they hold for good: looking through it took most of each collection, and
    # a tenth of loading.
    gc.disable()
    import transformers.utils.logging as library_log

    from trimtab_trainer.run import Run

    gc.freeze()
    gc.enable()
    library_log.disable_progress_bar()
    group = Group(place, config.resolved.world_size, config.spec.distributed.timeout_seconds)
    group.join()
    telling = reporter() if place.first else Silent()
    run = Run(config, group, workplace.work_root(), notice, telling)
    try:
        ending = run()
        group.leave()
        return RankResult(rank=place.rank, exit=Exit.OK, ending=ending)
    except Exception as error:  # noqa: BLE001 - the door: every ending becomes a result
        code, ending = ending_of(error, step=run.step, from_step=run.from_step)
        return RankResult(rank=place.rank, exit=code, ending=ending)
    finally:
        telling.close()


def cluster_reporter(config: RunConfig) -> Reporter:
    """What rank 0 reports to in a cluster."""
    told: list[Reporter] = [MetricsReporter(), *trackers.of(config, workplace.work_root())]
    if config.progress_config_map is not None:
        told.insert(0, ConfigMapReporter(config.job.namespace, config.progress_config_map))
    return Several(*told)


def terminal_reporter(config: RunConfig) -> Reporter:
    """What rank 0 reports to where a person watches."""
    from trimtab_trainer.bar import BarReporter

    return Several(BarReporter(), *trackers.of(config, workplace.work_root()))


def main() -> int:
    """Run this rank and return its exit code: 0 as well after a preemption, when all ranks leave together."""
    place, notice = Place.here(), Notice()
    notice.listen()
    watched = workplace.BAR in os.environ
    workplace.log_to_stderr(place.rank, quiet=watched)
    results.announce(workplace.results_folder(), place.rank)
    try:
        config = RunConfig.model_validate_json(workplace.run_file().read_text())
        workplace.prepare(workplace.work_root(), uses_hub(config), config.spec.dataset.workers)
        leave_out(unused(config))
        result = run_rank(config, place, notice, partial(terminal_reporter if watched else cluster_reporter, config))
    except Exception as error:  # noqa: BLE001 - the door: every ending becomes a result
        code, ending = ending_of(error)
        result = RankResult(rank=place.rank, exit=code, ending=ending)
    results.leave(workplace.results_folder(), result)
    return 0 if result.exit is Exit.PREEMPTED else int(result.exit)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A process that failed must not wait in the destructors of collectives that the others have left.
    os._exit(status)
