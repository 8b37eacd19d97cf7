"""`modsquad bench`: speed and memory beside dense layers and other libraries."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from trainer.terminal import say


class Part(StrEnum):
    """A part of the benchmark."""

    MLP = "mlp"
    ATTENTION = "attention"
    STEP = "step"
    SCALING = "scaling"
    SQUADS = "squads"
    COMM = "comm"
    PLAN = "plan"
    DATA = "data"


def bench(
    parts: Annotated[list[Part] | None, typer.Argument(help="Parts to run; default: all.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="File that receives the figures.")] = Path("bench.json"),
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of every comparison; default: each one's own.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="1 measures CPU time, more measure wall time.")] = 1,
    dtype: Annotated[Literal["both", "fp32", "bf16"], typer.Option(help="Precision.")] = "both",
    run: Annotated[
        Path | None,
        typer.Option(help="Run whose routing comm replays; default: train a small model, 4 min.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: whether it runs, not how fast.")] = False,
) -> None:
    """Measure speed and memory against dense layers and other libraries; a figure never fails the command."""
    from trainer.bench.comparison import DTYPES, Settings
    from trainer.bench.suite import run_parts, verdicts, write_results
    from trainer.bench.tables import comparison_table, limits_table

    console = Console()
    settings = Settings(threads=threads, rounds=rounds, quick=quick, run=run)
    comparisons = []
    for comparison in run_parts(parts or list(Part), list(DTYPES) if dtype == "both" else [dtype], settings):
        comparisons.append(comparison)
        console.print(comparison_table(comparison))
    console.print(limits_table(verdicts(comparisons, settings)))
    write_results(out, comparisons, settings)
    say(f"wrote {out}", console=console)
