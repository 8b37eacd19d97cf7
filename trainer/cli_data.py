"""`modsquad data`: make, pack, check and show shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from data_pipeline.pack import PackReport, Source

app = typer.Typer(no_args_is_help=True, help="Make, pack, check and show WebDataset shards.")
pack_app = typer.Typer(no_args_is_help=True, help="Convert an official dataset to shards.")
app.add_typer(pack_app, name="pack")

Out = Annotated[Path, typer.Argument(help="Folder that receives the shards and index.json.", show_default=False)]
Shards = Annotated[Path, typer.Argument(help="Folder of shards with index.json.", show_default=False)]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1, help="Samples in one shard.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad label instead of listing it.")]


@app.command()
def rooms(
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Number of rooms.")] = 1000,
    size: Annotated[int, typer.Option(min=32, max=512, help="Side in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Rooms are a function of (seed, index, size).")] = 0,
    workers: Workers = 2,
    samples_per_shard: PerShard = 128,
) -> None:
    """Make procedural rooms with labels of all 18 tasks."""
    from data_pipeline.rooms.source import RoomsSource

    pack_with_progress(
        RoomsSource(images=images, size=size, seed=seed), out, workers=workers, samples_per_shard=samples_per_shard
    )


@pack_app.command()
def taskonomy(
    raw: Annotated[Path, typer.Argument(help="Folder in any of the three layouts of Taskonomy.", show_default=False)],
    out: Out,
    size: Annotated[int, typer.Option(min=16, help="Side in pixels of the stored images.")] = 256,
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")] = "taskonomy",
    workers: Workers = 2,
    samples_per_shard: PerShard = 1000,
    strict: Strict = False,
) -> None:
    """Convert Taskonomy or omnidata: samples joined by (building, point, view), partial labels kept."""
    from configs.tasks import resolve_tasks
    from data_pipeline.taskonomy import TaskonomySource

    source = TaskonomySource(raw, size=size, tasks=resolve_tasks(tasks.split(",")))
    pack_with_progress(source, out, workers=workers, samples_per_shard=samples_per_shard, strict=strict)


@app.command()
def index(shards: Shards) -> None:
    """Build index.json for shards that another program wrote."""
    from data_pipeline.index import ShardIndex
    from data_pipeline.shards import build_index

    build_index(shards)
    Console().print(f"{shards}: {len(ShardIndex.load(shards))} samples indexed")


@app.command()
def check(shards: Shards) -> None:
    """Verify checksums, decode labels of some samples and print their statistics."""
    from data_pipeline.check import check_shards

    Console().print(check_shards(shards).table())


@app.command()
def show(
    shards: Shards,
    png: Annotated[Path, typer.Argument(help="Picture to write.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="Samples, spread over the shards.")] = 8,
    tasks: Annotated[str | None, typer.Option(help="Tasks or groups, separated by commas; default: all there.")] = None,
) -> None:
    """Draw a contact sheet: images beside their labels."""
    from configs.tasks import TASKS, resolve_tasks
    from data_pipeline.index import ShardIndex
    from data_pipeline.show import contact_sheet

    index = ShardIndex.load(shards)
    contact_sheet(
        index, resolve_tasks(tasks.split(",") if tasks else [name for name in TASKS if name in index.tasks]), count, png
    )
    Console().print(f"wrote {png}")


def pack_with_progress(
    source: Source, out: Path, *, workers: int, samples_per_shard: int, strict: bool = False
) -> PackReport:
    """Pack `source` into `out` with a progress bar, and say what was written and what was left out.

    Raises:
        UserError: see `data_pipeline.pack.pack`.
    """
    from data_pipeline.pack import pack

    console = Console()
    columns = (TextColumn(str(out)), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(source))
        report = pack(
            source,
            out,
            workers=workers,
            samples_per_shard=samples_per_shard,
            strict=strict,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
        progress.update(bar, completed=len(source))
    console.print(f"{out}: {report.samples} samples in {report.shards} shards", highlight=False)
    if report.problems:
        console.print(
            f"[yellow]left out: {len(report.problems)} labels or samples, listed in {out / 'problems.jsonl'}; "
            f"the first: {report.problems[0]}"
        )
    return report
