"""`modsquad tune`: searches layout and DeepSpeed settings by short real runs at a fixed global batch.

The first trial is the run as configured, the second one the same with the largest micro-batch. A trial whose fastest
measured step is clearly slower than the best trial's median is stopped; one that fails is a result. The search goes on
where it was ended (`trainer.tune.files`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Protocol

from cluster.groups import Layout
from cluster.launch import JOB_FILE, SLURM_FOLDER
from cluster.tune_search import Search
from cluster.tune_space import MICRO_BATCH, RECOMPUTE, Point, Space, Value, configured, with_value
from configs.load import dump_config
from configs.schema import RunConfig
from configs.watching import TrackersConfig
from trainer.footprint.plan import memory_per_rank
from trainer.tune.files import SearchRecord, TrialLog, TrialRecord
from trainer.tune.runs import Trial
from trainer.tune.trial import TRIAL_FILE, TrialRequest, read_figures, write_request

CLEARLY_SLOWER = 1.25


class Runner(Protocol):
    """Runs trials (`trainer.tune.runs`)."""

    @property
    def at_once(self) -> int:
        """How many it takes at a time."""

    def __call__(self, trials: Sequence[Trial], finished: Callable[[int, str | None], None]) -> None:
        """Run the trials; call `finished(place, reason)` for each, with None where it succeeded."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A finished search.

    Attributes:
        trials: in order.
        space: what was searched.
        baseline: the values of the run as configured.
    """

    trials: Sequence[TrialRecord]
    space: Space
    baseline: Mapping[str, Value]

    @property
    def best(self) -> TrialRecord | None:
        """The fastest of the trials that were measured to the end; None without one."""
        return max((trial for trial in self.trials if trial.status == "done"), key=_speed, default=None)

    @property
    def as_configured(self) -> TrialRecord | None:
        """The trial of the run as configured, if it was tried."""
        return next((trial for trial in self.trials if trial.values == self.baseline), None)


def fits_memory(config: RunConfig, ranks: int, limit_bytes: float, values: Mapping[str, Value]) -> bool:
    """Whether what the planner says of these settings is at most `limit_bytes` per rank."""
    changed = with_value(config, values)
    layout = Layout(ranks, changed.parallel.ep_size)
    micro_batch = changed.train.micro_batch or changed.train.images_per_step // ranks
    return memory_per_rank(changed, layout, changed.parallel.zero_stage, micro_batch).total <= limit_bytes


def tune(
    search: SearchRecord,
    space: Space,
    runner: Runner,
    *,
    out: Path,
    budget: int,
    tell: Callable[[TrialRecord], object],
) -> Tuning:
    """Run trials until `budget` of them are over, or nothing is left to try.

    Args:
        search: for which run, and how trials are measured.
        space: what to search.
        runner: runs trials.
        out: folder of the search; what an earlier call has done there counts.
        budget: trials in all.
        tell: hears of each trial that is over.

    Raises:
        UserError: `out` holds another search or cannot be written, or SLURM refuses.
        Stopped: a signal; the same call goes on.
    """
    log = TrialLog(out, search)
    baseline = {key: configured(search.config, key, search.ranks) for key in space.values}
    first = [tuple(baseline.values()), *_largest_batch(space, baseline)]
    finder = Search(space, seed=search.config.seed, first=first)
    allowed = set(space.points)
    for record in log.trials:
        if (point := _point(space, record)) in allowed:  # less memory may be free than before
            finder.take(point)
            if record.status != "started":
                finder.tell(point, record.images_per_second)
    while batch := _next_batch(log, finder, space, runner.at_once, budget):
        for record in batch:
            if record not in log.trials:
                log.note(record)
        best = min((trial.step_seconds for trial in log.trials if trial.status == "done"), key=_known, default=None)
        trials = [_prepare(log, record, search, best) for record in batch]

        def finished(place: int, reason: str | None, batch: Sequence[TrialRecord] = batch) -> None:
            record = _outcome(batch[place], log.trial_folder(batch[place].trial), reason, search.config)
            log.note(record)
            if (point := _point(space, record)) in allowed:
                finder.tell(point, record.images_per_second)
            tell(record)

        runner(trials, finished)
    return Tuning(trials=log.trials, space=space, baseline=baseline)


def _largest_batch(space: Space, baseline: Mapping[str, Value]) -> list[Point]:
    """Return the point with the largest micro-batch and, if it can be, no recomputation; otherwise as configured."""
    alike = [
        point
        for point in space.points
        if all(
            value == baseline[key] for key, value in space.named(point).items() if key not in (MICRO_BATCH, RECOMPUTE)
        )
    ]

    def eagerness(point: Point) -> tuple[bool, Value]:
        values = {**baseline, **space.named(point)}
        return values.get(RECOMPUTE, "none") == "none", values.get(MICRO_BATCH, 0)

    return [max(alike, key=eagerness)] if alike else []


def _next_batch(log: TrialLog, finder: Search, space: Space, at_once: int, budget: int) -> list[TrialRecord]:
    """Return trials that were started and not finished, then new ones, as far as the budget goes."""
    batch = [trial for trial in log.trials if trial.status == "started"][:at_once]
    number = len(log.trials)
    while len(batch) < at_once and number < budget and (point := finder.ask()) is not None:
        batch.append(TrialRecord(trial=number, values=space.named(point), status="started"))
        number += 1
    return batch


def _prepare(log: TrialLog, record: TrialRecord, search: SearchRecord, best_seconds: float | None) -> Trial:
    folder = log.trial_folder(record.trial)
    if not ((folder / SLURM_FOLDER / JOB_FILE).is_file() or (folder / TRIAL_FILE).is_file()):
        rmtree(folder, ignore_errors=True)  # of a search that was ended
        slowest = None if best_seconds is None else best_seconds * CLEARLY_SLOWER
        request = TrialRequest(steps=search.steps, warmup_steps=search.warmup_steps, slowest_seconds=slowest)
        write_request(folder, request)
    config = with_value(search.config, record.values)
    alone = config.model_copy(
        update={
            "run_dir": str(folder.resolve()),
            "train": config.train.model_copy(update={"steps": max(config.train.steps, search.steps)}),
            "telemetry": config.telemetry.model_copy(update={"port": None}),
            "trackers": TrackersConfig(),
        }
    )
    return Trial(folder, dump_config(alone))


def _outcome(record: TrialRecord, folder: Path, reason: str | None, config: RunConfig) -> TrialRecord:
    figures = read_figures(folder) if reason is None else None
    if figures is None:
        return record.model_copy(update={"status": "failed", "reason": reason or "it ended without figures"})
    seconds = median(figures.step_seconds)
    return record.model_copy(
        update={
            "status": "stopped" if figures.stopped else "done",
            "images_per_second": config.train.images_per_step / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": figures.data_wait_seconds,
            "peak_bytes": figures.peak_bytes,
            "device": figures.device,
        }
    )


def _point(space: Space, record: TrialRecord) -> Point:
    return tuple(record.values[key] for key in space.values)


def _speed(record: TrialRecord) -> float:
    return _known(record.images_per_second)


def _known(value: float | None) -> float:
    assert value is not None, "trials that are done have figures"
    return value
