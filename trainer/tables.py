"""Results as tables for the terminal."""

import math
from collections.abc import Callable, Sequence

from rich.table import Table

from trainer.run_files import EvaluationRecord
from trainer.squad_summary import SquadSummary


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
    """Return one column per extracted squad: size and metric of the whole model -> of the squad."""
    table = Table(title="squads: whole model -> standalone model")
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.task, justify="right")
    rows: dict[str, Callable[[SquadSummary], str]] = {
        "experts": lambda squad: "{1} -> {0}".format(*squad.experts),
        "parameters": lambda squad: f"{_count(squad.parameters_before)} -> {_count(squad.parameters_after)}",
        "MACs per image": lambda squad: f"{_count(squad.macs_before)} -> {_count(squad.macs_after)}",
        "metric": lambda squad: squad.metric,
        "value": lambda squad: f"{_number(squad.value_before)} -> {_number(squad.value_after)}",
        "relative change": lambda squad: _percent(squad.relative_change),
        "tokens unaffected": lambda squad: f"{squad.unaffected_tokens:.2%}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, summaries))
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
