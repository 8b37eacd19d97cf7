"""The page of `modsquad compare`: the tables of `trainer.report.compare` and loss curves over each other."""

import math
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from configs.atomic import write_text_atomically
from trainer.charts.training import LossCurve, loss_comparison_chart
from trainer.report import page as html
from trainer.report.compare import ComparedRun, ComparedTable, ComparedValue, compare_runs, remarks
from trainer.run_files import StepRecord


def write_comparison(runs: Sequence[ComparedRun], out: Path) -> Path:
    """Write the page and return its path; it carries its pictures inside.

    Raises:
        UserError: the file cannot be written.
    """
    tables = {table.title: table for table in compare_runs(runs)}
    settings = tables.pop("Configuration", None)
    sections = [_table_section(table, runs) for table in tables.values()]
    if notes := remarks(runs):
        body = "".join(html.note(note) for note in notes)
        sections.insert(0, html.Section(title="Before you compare", body=body))
    sections.append(_losses_section(runs))
    if settings:
        sections.append(_table_section(settings, runs))
    tiles = [("runs", str(len(runs))), ("settings that differ", str(len(settings.rows) if settings else 0))]
    write_text_atomically(out, html.page("Runs side by side", ", ".join(run.name for run in runs), tiles, sections))
    return out


def _table_section(table: ComparedTable, runs: Sequence[ComparedRun]) -> html.Section:
    names = [run.name for run in runs]
    rows: list[list[html.Cell]] = [[name, *map(_cell, values)] for name, values in table.rows]
    return html.Section(title=table.title, caption=table.caption, body=html.table(["", *names], rows, right=names))


def _cell(value: ComparedValue) -> html.Markup:
    text = f"<b>★ {escape(value.text)}</b>" if value.is_best else escape(value.text)
    if value.change:
        colour = {"better": "good", "worse": "bad", None: "soft"}[value.verdict]
        text += f' <span class="{colour}">{escape(value.change)}</span>'
    return html.Markup(text)


def _losses_section(runs: Sequence[ComparedRun]) -> html.Section:
    """Draw the total loss and that of every task, a line per run."""
    title = "Losses"
    logged = [run for run in runs if run.steps]
    if not logged:
        return html.Section(title=title, body=html.missing("no logged steps", "No run has written metrics.jsonl."))
    same_batch = len({record.images / record.step for run in logged for record in run.steps}) == 1
    tasks = list(dict.fromkeys(task for run in logged for task in run.steps[-1].task_loss))
    panels = {"total loss": [_curve(run, None, same_batch) for run in logged]}
    panels |= {task: [_curve(run, task, same_batch) for run in logged] for task in tasks}
    with tempfile.TemporaryDirectory(prefix="modsquad-compare-") as folder:
        path = Path(folder) / "losses.png"
        loss_comparison_chart(path, panels, "step" if same_batch else "images seen")
        body = html.chart(path, f"Total loss and the loss of every task, a line for each of {len(logged)} runs")
    caption = "Smoothed. Total losses compare only between runs of the same tasks and weights."
    return html.Section(title=title, caption=caption, body=body)


def _curve(run: ComparedRun, task: str | None, over_steps: bool) -> LossCurve:
    def loss(record: StepRecord) -> float:
        return record.loss if task is None else record.task_loss.get(task, math.nan)

    return LossCurve(
        name=run.name,
        place=np.array([record.step if over_steps else record.images for record in run.steps], dtype=np.float64),
        loss=np.array([loss(record) for record in run.steps], dtype=np.float64),
    )
