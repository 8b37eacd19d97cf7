"""Several runs side by side: what differs in their configurations, and what they gave, as tables of text.

The terminal and the page show the same tables. Changes are relative to the first run. Their mean over tasks, positive
for the better, is the multi-task gain of Maninis et al. (arXiv 1904.08918, equation 4) with the first run as the
baseline, over the tasks that both runs have a score of.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from configs.errors import UserError
from configs.load import differing_keys
from configs.schema import RunConfig
from configs.tasks import TaskSpec
from model.cost import count_active_parameters, count_image_macs, count_parameters
from model.routing_stats import RoutingLedger
from trainer.report.page import UNKNOWN, number, percent, quantity
from trainer.report.training import latest_manifest
from trainer.run_files import (
    EvaluationRecord,
    StepRecord,
    read_config,
    read_latest_evaluation,
    read_latest_ledger,
    read_steps,
)
from trainer.throughput import throughput


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """What one run folder holds; `name` tells it from the others."""

    name: str
    folder: Path
    config: RunConfig
    steps: list[StepRecord]
    evaluation: EvaluationRecord | None
    ledger: RoutingLedger | None

    @property
    def done(self) -> int:
        """Finished steps."""
        return self.steps[-1].step if self.steps else 0


@dataclass(frozen=True, kw_only=True)
class ComparedValue:
    """One run's cell of a row.

    Attributes:
        text: the value.
        is_best: no other run has a better one, and at least one has a worse one.
        change: relative to the first run, in percent; empty where there is none.
        verdict: whether that is for the better; None where nobody can say.
    """

    text: str
    is_best: bool = False
    change: str = ""
    verdict: Literal["better", "worse"] | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedTable:
    """A table with a column per run: (name of the row, one value per run)."""

    title: str
    caption: str
    rows: tuple[tuple[str, tuple[ComparedValue, ...]], ...]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Return what the run folders hold, in the given order.

    Raises:
        UserError: fewer than two folders, one twice, one that is no run, or a file that does not parse.
    """
    if len(folders) < 2:
        raise UserError("one run cannot be compared: give at least two run folders")
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise UserError(f"{folder} is given {count} times: give each run once")
    short = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, short, strict=True):
        ledger = read_latest_ledger(folder)
        runs.append(
            ComparedRun(
                name=name if short.count(name) == 1 else str(folder),
                folder=folder,
                config=read_config(folder),
                steps=read_steps(folder),
                evaluation=read_latest_evaluation(folder),
                ledger=ledger[1] if ledger else None,
            )
        )
    return runs


def remarks(runs: Sequence[ComparedRun]) -> list[str]:
    """Return what a reader must know before comparing: what is missing, unfinished, or not the same for all."""
    found = []
    for run in runs:
        if run.done < run.config.train.steps:
            found.append(f"{run.name} is not finished: {run.done:,} of {run.config.train.steps:,} steps")
        if run.evaluation is None:
            found.append(f"{run.name} has no evaluation: `modsquad evaluate {run.folder}` makes one")
        elif run.evaluation.step < run.done:
            found.append(
                f"{run.name} was evaluated at step {run.evaluation.step:,}, before its latest, {run.done:,}: "
                f"`modsquad evaluate {run.folder}` evaluates its latest checkpoint"
            )
    shared = set.intersection(*(_tasks(run) for run in runs))
    found += [
        f"not all runs have these tasks of {run.name}: {', '.join(own)}"
        for run in runs
        if (own := sorted(_tasks(run) - shared))
    ]
    if other := sorted(task for task in shared if len({_meaning(run, task) for run in runs}) > 1):
        found.append(f"not all runs mean the same by these tasks, so their figures do not compare: {', '.join(other)}")
    judged = {(run.evaluation.images, run.config.data.val) for run in runs if run.evaluation}
    if len(judged) > 1:
        found.append("the runs were evaluated on different images, or on shards of different names: compare with care")
    return found


def compare_runs(runs: Sequence[ComparedRun]) -> list[ComparedTable]:
    """Return the tables, the most telling first; those without rows are left out."""
    tables = [_metrics(runs), _information(runs), _costs(runs), _settings(runs)]
    return [table for table in tables if table.rows]


def _metrics(runs: Sequence[ComparedRun]) -> ComparedTable:
    """A row per task and metric, and the mean gain."""
    names = {
        (task, score.metric): score.higher_is_better
        for run in runs
        if run.evaluation
        for task, score in run.evaluation.tasks.items()
    }
    rows, gains = [], [list[float]() for _ in runs]
    for (task, metric), higher_is_better in names.items():
        values = [_score(run, task, metric) for run in runs]
        rows.append((f"{task}, {metric} {'↑' if higher_is_better else '↓'}", _judged(values, higher_is_better)))
        for of_run, value in zip(gains[1:], values[1:], strict=True):
            if math.isfinite(change := _relative(value, values[0])):
                of_run.append(change if higher_is_better else -change)
    if any(gains):
        cells = [
            ComparedValue(
                text=f"{len(of_run)} tasks" if of_run else UNKNOWN,
                change=percent(mean(of_run), signed=True) if of_run else "",
                verdict=("better" if mean(of_run) >= 0 else "worse") if of_run else None,
            )
            for of_run in gains
        ]
        rows.append(("mean gain over the first", tuple(cells)))
    caption = (
        "Of the latest evaluation on the validation shards. ★ marks the best (↑ higher is better, ↓ lower is better); "
        "beside it the change to the first run. The mean gain counts changes for the better as positive, over the "
        "tasks that both runs have."
    )
    return ComparedTable(title="Metrics", caption=caption, rows=tuple(rows))


def _information(runs: Sequence[ComparedRun]) -> ComparedTable:
    """A row per expert layer that sees the task."""
    of_runs = [
        {info.name: run.ledger.mutual_information(info.name) for info in run.ledger.layers if info.sees_task}
        if run.ledger
        else {}
        for run in runs
    ]
    layers = list(dict.fromkeys(layer for of_run in of_runs for layer in of_run))
    rows = [
        (layer, tuple(ComparedValue(text=number(of_run.get(layer, math.nan))) for of_run in of_runs))
        for layer in layers
    ]
    if len(layers) > 1:
        means = [mean(of_run.values()) if of_run else math.nan for of_run in of_runs]
        rows.append(("mean over layers", tuple(ComparedValue(text=number(value)) for value in means)))
    caption = "Of tasks and experts, in nats, on the images of the latest evaluation."
    return ComparedTable(title="Mutual information", caption=caption, rows=tuple(rows))


def _costs(runs: Sequence[ComparedRun]) -> ComparedTable:
    """Progress; then sizes and speed, with their changes."""
    progress: dict[str, Callable[[ComparedRun], float]] = {
        "steps": lambda run: run.done,
        "images seen": lambda run: run.steps[-1].images if run.steps else 0,
        "loss": lambda run: run.steps[-1].loss if run.steps else math.nan,
        "tasks": lambda run: len(run.config.task_specs),
        "ranks": _ranks,
    }
    sizes: dict[str, Callable[[ComparedRun], float]] = {
        "parameters": _parameters,
        "parameters per token, mean over tasks": _active_parameters,
        "MACs of an image with all tasks": _image_macs,
        "median step (s)": _step_seconds,
        "images per second": _images_per_second,
    }
    rows = []
    for name, measure in (progress | sizes).items():
        values = [measure(run) for run in runs]
        write = quantity if name in sizes and max(values) >= 1e4 else number
        cells = [
            ComparedValue(
                text=write(value) if math.isfinite(value) else UNKNOWN,
                change=_change(value, values[0]) if name in sizes and place and value != values[0] else "",
            )
            for place, value in enumerate(values)
        ]
        rows.append((name, tuple(cells)))
    caption = (
        "Sizes follow from the configurations; speeds are as logged, on whatever machine each run had. Losses compare "
        "only between runs of the same tasks and weights."
    )
    return ComparedTable(title="Size and speed", caption=caption, rows=tuple(rows))


def _settings(runs: Sequence[ComparedRun]) -> ComparedTable:
    """A row per key that is not the same in all runs; cells like the first run's have no verdict and no mark."""
    found = {key for run in runs[1:] for key in differing_keys(runs[0].config, run.config)} - {"run_dir"}
    keys = sorted(key for key in found if not any(other.startswith(f"{key}.") for other in found))
    of_runs = [run.config.model_dump(mode="json") for run in runs]
    rows = [(key, tuple(ComparedValue(text=_setting(values, key)) for values in of_runs)) for key in keys]
    caption = "Only keys that differ; run_dir is left out."
    return ComparedTable(title="Configuration", caption=caption, rows=tuple(rows))


def _judged(values: Sequence[float], higher_is_better: bool) -> tuple[ComparedValue, ...]:
    """Return the cells of a metric."""
    known = [value for value in values if math.isfinite(value)]
    best = (max if higher_is_better else min)(known, default=math.nan)
    cells = []
    for place, value in enumerate(values):
        change = _relative(value, values[0]) if place else math.nan
        verdict: Literal["better", "worse"] | None = None
        if math.isfinite(change) and change:
            verdict = "better" if (change > 0) == higher_is_better else "worse"
        cells.append(
            ComparedValue(
                text=number(value),
                is_best=value == best and len(set(known)) > 1,
                change=percent(change, signed=True) if math.isfinite(change) else "",
                verdict=verdict,
            )
        )
    return tuple(cells)


def _score(run: ComparedRun, task: str, metric: str) -> float:
    score = run.evaluation.tasks.get(task) if run.evaluation else None
    return score.value if score and score.metric == metric else math.nan


def _relative(value: float, first: float) -> float:
    return (value - first) / abs(first) if first else math.nan


def _change(value: float, first: float) -> str:
    change = _relative(value, first)
    return percent(change, signed=True) if math.isfinite(change) else ""


def _tasks(run: ComparedRun) -> set[str]:
    return {spec.name for spec in run.config.task_specs}


def _meaning(run: ComparedRun, task: str) -> TaskSpec:
    """What a task's figures are about, however it is trained and whatever else is measured."""
    return replace(run.config.task_table[task], loss="l1", metrics=())


def _parameters(run: ComparedRun) -> float:
    return count_parameters(run.config.model, run.config.task_specs, run.config.data.image_size).total


def _active_parameters(run: ComparedRun) -> float:
    config = run.config
    return mean(count_active_parameters(config.model, spec, config.data.image_size) for spec in config.task_specs)


def _image_macs(run: ComparedRun) -> float:
    return count_image_macs(run.config.model, run.config.task_specs, run.config.data.image_size)


def _ranks(run: ComparedRun) -> float:
    manifest = latest_manifest(run.folder)
    return manifest.world if manifest else math.nan


def _step_seconds(run: ComparedRun) -> float:
    return _known_median([record.step_seconds for record in run.steps])


def _images_per_second(run: ComparedRun) -> float:
    return _known_median(throughput(run.steps))


def _known_median(values: Sequence[float]) -> float:
    known = [value for value in values if value > 0]
    return median(known) if known else math.nan


def _setting(values: Any, key: str) -> str:
    """Return the value of a dotted key, as YAML writes it on one line; a dash where the key does not exist."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return UNKNOWN
        values = values[name]
    return values if isinstance(values, str) else json.dumps(values)
