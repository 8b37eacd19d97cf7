"""Results as tables for the terminal."""

import math
from collections.abc import Sequence

from rich.table import Table

from trainer.run_files import EvaluationRecord
from trainer.squad_summary import SquadSummary


def evaluation_table(evaluation: EvaluationRecord) -> Table:
    """Return one row per task: metric, the model's value, the best constant's, and which is better."""
    table = Table(title=f"{evaluation.split}, {evaluation.images} images, step {evaluation.step}")
    for column in ("task", "metric", ""):
        table.add_column(column)
    for column in ("model", "constant"):
        table.add_column(column, justify="right")
    table.add_column("beats constant")
    for name, score in evaluation.tasks.items():
        verdict = {True: "[green]yes", False: "[red]no", None: "unknown"}[score.beats_constant]
        better = "higher is better" if score.higher_is_better else "lower is better"
        table.add_row(name, score.metric, better, _number(score.value), _number(score.constant), verdict)
    return table


def squad_table(summaries: Sequence[SquadSummary]) -> Table:
    """Return one row per extracted squad: size and metric beside the whole model."""
    table = Table(title="squads: whole model -> standalone model")
    table.add_column("task")
    for column in ("experts", "parameters", "MACs per image", "metric", "change", "tokens unaffected"):
        table.add_column(column, justify="right")
    for summary in summaries:
        kept, total = summary.experts
        table.add_row(
            summary.task,
            f"{total} -> {kept}",
            f"{_count(summary.parameters_before)} -> {_count(summary.parameters_after)}",
            f"{_count(summary.macs_before)} -> {_count(summary.macs_after)}",
            f"{summary.metric} {_number(summary.value_before)} -> {_number(summary.value_after)}",
            "unknown" if math.isnan(summary.relative_change) else f"{summary.relative_change:+.3%}",
            f"{summary.unaffected_tokens:.2%}",
        )
    return table


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def _count(value: int) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.2f} {unit}"
    return str(value)
