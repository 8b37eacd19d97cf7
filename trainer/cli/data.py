"""`modsquad data`: make, pack, check and show shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from configs.tasks import TaskTable
    from data_pipeline.codecs import ImageCodec
    from data_pipeline.pack import PackReport, Source
    from data_pipeline.sources.taskonomy_splits import Split

app = typer.Typer(no_args_is_help=True, help="Make, pack, check and show WebDataset shards.")
pack_app = typer.Typer(no_args_is_help=True, help="Convert a dataset, official or your own, to shards.")
app.add_typer(pack_app, name="pack")

Out = Annotated[Path, typer.Argument(help="Folder that receives the shards and index.json.", show_default=False)]
Shards = Annotated[str, typer.Argument(help="Folder of shards with index.json, or its URL.", show_default=False)]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
PerShard = Annotated[int, typer.Option("--samples-per-shard", min=1, help="At most so many samples in one shard.")]
LabelCodec = Annotated[
    Literal["png", "zstd"], typer.Option(help="Dense labels as PNG, or as Zstandard byte planes: faster to read.")
]
ImageFormat = Annotated[
    Literal["png", "jpeg", "webp"],
    typer.Option("--image-codec", help="Images as PNG, without loss; as JPEG (4:4:4), fastest to read; or as WebP."),
]
ImageQuality = Annotated[
    int | None,
    typer.Option(min=1, max=100, help="Of JPEG and WebP; WebP at 100 is without loss.", show_default="95"),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad label or view instead of listing it.")]


@app.command()
def rooms(
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Number of rooms.")] = 1000,
    size: Annotated[int, typer.Option(min=32, max=512, help="Side in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Rooms are a function of (seed, index, size).")] = 0,
    workers: Workers = 2,
    samples_per_shard: PerShard = 128,
    label_codec: LabelCodec = "png",
    image_codec: ImageFormat = "png",
    image_quality: ImageQuality = None,
) -> None:
    """Make procedural rooms with labels of all 18 tasks."""
    from data_pipeline.rooms.source import RoomsSource

    source = RoomsSource(images=images, size=size, seed=seed)
    pack_with_progress(
        source,
        out,
        workers=workers,
        samples_per_shard=samples_per_shard,
        label_codec=label_codec,
        image_codec=_image_codec(image_codec, image_quality),
    )


@pack_app.command()
def taskonomy(
    raw: Annotated[Path, typer.Argument(help="Folder in any of the three layouts of Taskonomy.", show_default=False)],
    out: Out,
    split: Annotated[
        Literal["tiny", "medium", "full", "fullplus"] | None,
        typer.Option(help="Official split; default: all buildings.", show_default=False),
    ] = None,
    part: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="Part of the split; default: train.", show_default=False),
    ] = None,
    split_csv: Annotated[
        Path | None,
        typer.Option(help="The split's file; default: train_val_test_SPLIT.csv in RAW.", show_default=False),
    ] = None,
    classes: Annotated[
        Literal["all", "selected"],
        typer.Option(help="Class labels over all classes, or over the 100 objects and 63 scenes found indoors."),
    ] = "all",
    size: Annotated[int, typer.Option(min=16, help="Side in pixels of the stored images.")] = 256,
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")] = "taskonomy",
    workers: Workers = 2,
    samples_per_shard: PerShard = 1000,
    label_codec: LabelCodec = "png",
    image_codec: ImageFormat = "png",
    image_quality: ImageQuality = None,
    strict: Strict = False,
) -> None:
    """Convert Taskonomy or omnidata: samples joined by (building, point, view), partial labels kept."""
    from configs.errors import UserError
    from configs.tasks import resolve_tasks
    from data_pipeline.sources.taskonomy import TaskonomySource
    from data_pipeline.sources.taskonomy_splits import find_split_file, read_split

    official: Split | None = None
    if split is not None:
        official = read_split(split_csv or find_split_file(raw, split), split, part or "train")
    elif part or split_csv:
        raise UserError("--part and --split-csv say which part of which file: give --split too, such as --split tiny")
    source = TaskonomySource(raw, size=size, tasks=resolve_tasks(_split(tasks)), split=official, classes=classes)
    pack_with_progress(
        source,
        out,
        workers=workers,
        samples_per_shard=samples_per_shard,
        label_codec=label_codec,
        image_codec=_image_codec(image_codec, image_quality),
        facts=source.facts,
        strict=strict,
    )


@pack_app.command("pascal-context")
def pascal_context(
    raw: Annotated[Path, typer.Argument(help="PASCAL_MT: holds JPEGImages and ImageSets.", show_default=False)],
    out: Out,
    split: Annotated[Literal["train", "val"], typer.Option(help="Official list of images.", show_default=False)],
    size: Annotated[int, typer.Option(min=16, help="Side in pixels of the stored images.")] = 512,
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas.")] = "pascal_context",
    workers: Workers = 2,
    samples_per_shard: PerShard = 250,
    label_codec: LabelCodec = "png",
    image_codec: ImageFormat = "png",
    image_quality: ImageQuality = None,
    strict: Strict = False,
) -> None:
    """Convert PASCAL-Context: five tasks of one split, images scaled to squares, partial labels kept."""
    from configs.errors import UserError
    from configs.tasks import resolve_tasks
    from data_pipeline.sources.pascal_context import PascalContextSource

    if out.resolve().is_relative_to(raw.resolve()):
        raise UserError(f"{out} lies in {raw}, which stays as it is: give a folder elsewhere")
    source = PascalContextSource(raw, split, size=size, tasks=resolve_tasks(_split(tasks)))
    pack_with_progress(
        source,
        out,
        workers=workers,
        samples_per_shard=samples_per_shard,
        label_codec=label_codec,
        image_codec=_image_codec(image_codec, image_quality),
        facts=source.facts,
        strict=strict,
    )


@pack_app.command("folder")
def folder(
    description: Annotated[Path, typer.Argument(help="YAML file: docs/own_data.md.", show_default=False)],
    out: Out,
    split: Annotated[
        str | None,
        typer.Option(help="Part to take, where the description parts the samples.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Side in pixels of the stored images.")] = 256,
    workers: Workers = 2,
    samples_per_shard: PerShard = 250,
    label_codec: LabelCodec = "png",
    image_codec: ImageFormat = "png",
    image_quality: ImageQuality = None,
    strict: Strict = False,
) -> None:
    """Convert a folder or table of your own, as a YAML file describes it."""
    from data_pipeline.sources.folder_source import FolderSource

    source = FolderSource(description, size=size, split=split)
    pack_with_progress(
        source,
        out,
        task_table=source.task_table,
        workers=workers,
        samples_per_shard=samples_per_shard,
        label_codec=label_codec,
        image_codec=_image_codec(image_codec, image_quality),
        facts=source.facts,
        strict=strict,
    )


@app.command()
def index(
    shards: Annotated[Path, typer.Argument(help="Folder of tar shards; receives index.json.", show_default=False)],
    define: Annotated[
        Path | None,
        typer.Option(help="YAML file whose define_tasks say what members of other names are.", show_default=False),
    ] = None,
) -> None:
    """Build index.json for shards that another program wrote."""
    from configs.task_definitions import defined_in
    from configs.yaml_files import read_mapping
    from data_pipeline.index import ShardIndex
    from data_pipeline.shards import build_index

    build_index(shards, defined_in(read_mapping(define) if define else {}, str(define)))
    say(f"{shards}: {len(ShardIndex.load(shards))} samples indexed")


@app.command()
def check(shards: Shards) -> None:
    """Verify checksums, decode labels of some samples and print their statistics."""
    from data_pipeline.check import check_shards

    Console().print(check_shards(shards).table())


@app.command()
def show(
    shards: Shards,
    png: Annotated[Path, typer.Argument(help="Picture to write.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="Samples, from the first one on.")] = 8,
    tasks: Annotated[str | None, typer.Option(help="Tasks or groups, separated by commas; default: all there.")] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="Recipe or YAML file: show samples as it augments them for training.", show_default=False),
    ] = None,
) -> None:
    """Draw a contact sheet: images beside their labels."""
    from configs.tasks import resolve_tasks
    from data_pipeline.draws import Augment
    from data_pipeline.index import ShardIndex
    from data_pipeline.show import contact_sheet
    from trainer.recipes import load_recipe

    index = ShardIndex.load(shards)
    names = _split(tasks) if tasks else [name for name in index.task_table if name in index.tasks]
    config = load_recipe(augment) if augment else None
    drawn = Augment(config.seed, config.data.augment) if config else None
    contact_sheet(index, resolve_tasks(names, index.task_table), count, png, drawn)
    say(f"wrote {png}")


def pack_with_progress(
    source: Source,
    out: Path,
    *,
    workers: int,
    samples_per_shard: int,
    label_codec: Literal["png", "zstd"] = "png",
    image_codec: ImageCodec | None = None,
    task_table: TaskTable | None = None,
    facts: Sequence[str] = (),
    strict: bool = False,
) -> PackReport:
    """Pack `source` into `out` with a progress bar, and say what was written, of what, and what was left out.

    Raises:
        UserError: see `data_pipeline.pack.pack`.
    """
    from configs.tasks import TASKS
    from data_pipeline.codecs import PNG
    from data_pipeline.pack import pack
    from data_pipeline.source import PROBLEMS_FILE

    console = Console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(str(out), total=len(source))
        report = pack(
            source,
            out,
            workers=workers,
            samples_per_shard=samples_per_shard,
            label_codec=label_codec,
            image_codec=image_codec or PNG,
            task_table=TASKS if task_table is None else task_table,
            facts=facts,
            strict=strict,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
        progress.update(bar, completed=len(source))
    say(f"{out}: {report.samples} samples in {report.shards} shards", console=console)
    for fact in facts:
        say(fact, console=console)
    if report.problems:
        say(
            f"left out: {len(report.problems)} labels or samples, listed in {out / PROBLEMS_FILE} (mend them and pack "
            f"into a new folder); the first: {report.problems[0]}",
            console=console,
            style="yellow",
        )
    return report


def _image_codec(image_format: Literal["png", "jpeg", "webp"], quality: int | None) -> ImageCodec:
    from configs.errors import UserError
    from data_pipeline.codecs import ImageCodec

    if quality is None:
        return ImageCodec(image_format)
    if image_format == "png":
        raise UserError("PNG has no quality: give --image-codec jpeg or webp with --image-quality")
    return ImageCodec(image_format, quality)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]
