"""Results as tables for the terminal."""

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from trainer.evaluation.gradient_conflict import summary_rows
from trainer.run_files import ConflictRecord, EvaluationRecord
from trainer.squads.curve import SquadCurve
from trainer.squads.summary import SquadScore, SquadSummary


def evaluation_table(evaluation: EvaluationRecord) -> Table:
    """Return one row per task: metric (↑ higher is better), the value of the model and of the best constant."""
    table = Table(title=f"{evaluation.split}, {evaluation.images} images, step {evaluation.step}")
    for column in ("task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("model", "constant"):
        table.add_column(column, justify="right")
    table.add_column("better?")
    for name, score in evaluation.tasks.items():
        verdict = {True: "[green]yes", False: "[red]no", None: "unknown"}[score.beats_constant]
        arrow = "↑" if score.higher_is_better else "↓"
        table.add_row(name, f"{score.metric} {arrow}", _number(score.value), _number(score.constant), verdict)
    return table


def squad_table(summaries: Sequence[SquadSummary]) -> Table:
    """Return one column per extracted squad: sizes and metrics of the whole model -> of the squad; a line per task."""
    table = Table(title="squads: whole model -> standalone model")
    table.add_column("")
    for summary in summaries:
        table.add_column("\n".join(summary.tasks), justify="right")
    rows: dict[str, Callable[[SquadSummary], str]] = {
        "experts": lambda squad: "{1} -> {0}".format(*squad.experts),
        "parameters": lambda squad: f"{_count(squad.parameters_before)} -> {_count(squad.parameters_after)}",
        "MACs per image": lambda squad: f"{_count(squad.macs_before)} -> {_count(squad.macs_after)}",
        "metric": _per_task(lambda score: score.metric),
        "value": _per_task(lambda score: f"{_number(score.before)} -> {_number(score.after)}"),
        "relative change": _per_task(lambda score: _percent(score.relative_change)),
        "tokens unaffected": _per_task(lambda score: f"{score.unaffected_tokens:.2%}"),
        "images unaffected": _per_task(lambda score: f"{score.unaffected_images:.2%}"),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, summaries))
    return table


def curve_table(curve: SquadCurve) -> Table:
    """Return one row per threshold; cells of several tasks have a line per task. The written squad's row is bold.

    MACs stand in the title, as no threshold changes them.
    """
    first = curve.points[0]
    title = f"squads by threshold: {first.images} images, step {first.step}, {_count(first.macs_after)} MACs per image"
    # Narrow, for a terminal of 80 columns.
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True, pad_edge=False, show_edge=False)
    columns: dict[str, Callable[[SquadSummary], str]] = {
        "threshold": lambda squad: f"{squad.threshold:g}",
        "experts": lambda squad: str(squad.experts[0]),
        "params": lambda squad: _count(squad.parameters_after),
        "task": _per_task(lambda score: score.task),
        "tokens\nsame": _per_task(lambda score: f"{score.unaffected_tokens:.2%}"),
        "images\nsame": _per_task(lambda score: f"{score.unaffected_images:.2%}"),
        "value": _per_task(lambda score: _number(score.after)),
        "change": _per_task(lambda score: _percent(score.relative_change)),
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for point in curve.points:
        style = "bold" if point.threshold == curve.threshold else None
        table.add_row(*(cell(point) for cell in columns.values()), style=style)
    return table


def _per_task(cell: Callable[[SquadScore], str]) -> Callable[[SquadSummary], str]:
    return lambda squad: "\n".join(map(cell, squad.scores))


def conflict_table(record: ConflictRecord) -> Table:
    """Return one row per kind of weights: how far the tasks' gradients conflict there."""
    table = Table(title=f"gradients of {len(record.tasks)} tasks, {record.images} images, step {record.step}")
    table.add_column("weights", no_wrap=True)
    for column in ("number", "mean cosine", "conflicting", "strength"):
        table.add_column(column, justify="right")
    for name, weights, conflict in summary_rows(record):
        share = "unknown" if math.isnan(conflict.share) else f"{conflict.share:.1%}"
        table.add_row(name, _count(weights), _number(conflict.mean), share, _number(conflict.strength))
    return table


def _percent(change: float) -> str:
    return "unknown" if math.isnan(change) else f"{change:+.3%}"


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def _count(value: int) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.2f} {unit}"
    return str(value)
