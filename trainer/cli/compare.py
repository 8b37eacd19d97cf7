"""`modsquad compare`: several runs side by side, in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.terminal import say

if TYPE_CHECKING:
    from trainer.report.compare import ComparedTable, ComparedValue


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; changes are to the first.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("compare.html"),
) -> None:
    """Lay runs side by side: metrics, mutual information, sizes, speed, losses, and the settings that differ."""
    from trainer.report.compare import compare_runs, read_runs, remarks
    from trainer.report.compare_page import write_comparison

    found = read_runs(runs)
    page = write_comparison(found, out)
    console = Console()
    for table in compare_runs(found):
        console.print(_rich_table(table, [run.name for run in found]))
    for remark in remarks(found):
        say(f"note: {remark}", console=console, style="yellow")
    say(f"wrote {page}", console=console)


def _rich_table(table: ComparedTable, names: Sequence[str]) -> Table:
    drawn = Table(title=table.title, title_justify="left")
    drawn.add_column("", overflow="fold")
    for name in names:
        drawn.add_column(Text(name), justify="right", overflow="fold")
    for row, values in table.rows:
        drawn.add_row(Text(row), *map(_cell, values))
    return drawn


def _cell(value: ComparedValue) -> Text:
    cell = Text(f"★ {value.text}", "bold") if value.is_best else Text(value.text)
    if value.change:
        colour = {"better": "green", "worse": "red", None: "dim"}[value.verdict]
        cell.append(f" {value.change}", colour)
    return cell
