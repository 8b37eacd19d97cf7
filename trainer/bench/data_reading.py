"""Reading shards beside webdataset, the loader's processes, and its growth with workers and shards.

Samples are rooms with the labels of 13 tasks, as this project's packer writes them; all files are in the page cache.
This project's side is the whole loader: plan, augmentation draws, and batches of stacked tensors. The webdataset side
ends with decoded samples, or with their arrays stacked into batches of the same size, as a training needs them. Nothing
depends on a precision, so it is measured with fp32 only.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import active_children
from pathlib import Path

from configs.schema import DataConfig
from data_pipeline.cursor import Cursor
from data_pipeline.loader import TrainLoader
from data_pipeline.shards import ShardIndex
from trainer.bench.comparison import Comparison, Row, Settings
from trainer.bench.data_shards import (
    SEED,
    TASKS,
    in_batches,
    make_samples,
    webdataset_by_our_codecs,
    webdataset_by_pil,
    write_shards,
)
from trainer.bench.harness import Quartiles, Timing, clock_for, interleave, quartiles

ROUNDS = 5
WORKERS = (1, 2, 4)
SHARDS = (1, 8, 64)
FIXED_TASK = "normal"

ALLOWED_MILLISECONDS = {"all tasks": 7.0, "one task": 2.5}
"""CPU time of all processes per sample with two workers."""

_TASKS_PER_IMAGE = {"all tasks": None, "one task": 1}
_READERS_SHARDS = 4


def by_pil(which: str) -> str:
    """Name the row of webdataset with its own decoder of PNG."""
    return f"webdataset pil, {which}"


def by_codecs(which: str) -> str:
    """Name the row of webdataset with this project's decoders."""
    return f"webdataset+codecs, {which}"


def by_codecs_in_batches(which: str) -> str:
    """Name the row of webdataset with this project's decoders, its samples stacked into batches."""
    return f"the same in batches, {which}"


def compare_data(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure reading against webdataset, and the loader with workers and shards."""
    if dtype != "fp32":
        return []
    count, side, shard_counts = (16, 32, SHARDS[:2]) if settings.quick else (64, 256, SHARDS)
    with tempfile.TemporaryDirectory(prefix="modsquad-bench-") as folder:
        place, samples = Path(folder), make_samples(count, side)
        png = write_shards(place / "png", samples, shards=_READERS_SHARDS, image_format="png", label_codec="png")
        best = {
            shards: write_shards(place / f"{shards}", samples, shards=shards, image_format="jpeg", label_codec="zstd")
            for shards in sorted({*shard_counts, _READERS_SHARDS})
        }
        what = f"{count} samples with 13 labels, {side} px"
        return [
            *(_readers(settings, which, png, best[_READERS_SHARDS], what) for which in _TASKS_PER_IMAGE),
            *(_processes(settings, which, best[_READERS_SHARDS], what) for which in _TASKS_PER_IMAGE),
            _shards(settings, {shards: best[shards] for shards in shard_counts}, what),
        ]


def _readers(settings: Settings, which: str, png: Path, best: Path, what: str) -> Comparison:
    peers: dict[str, Callable[[int], object]] = {
        by_pil(which): lambda _: _drain(webdataset_by_pil(png)),
        by_codecs(which): lambda _: _drain(webdataset_by_our_codecs(best)),
        by_codecs_in_batches(which): lambda _: _drain(in_batches(webdataset_by_our_codecs(best), _batch(settings))),
    }
    notes = {
        by_pil(which): "PNG shards, decode('pil'); 16-bit labels come out wrong",
        by_codecs(which): "the same shards, every member decoded by this project's codecs",
        by_codecs_in_batches(which): f"stacked into batches of {_batch(settings)}, as this project's",
    }
    if which == "one task":
        fixed = "the same, one fixed task"
        peers[fixed] = lambda _: _drain(webdataset_by_our_codecs(best, FIXED_TASK))
        notes[fixed] = f"the same task ({FIXED_TASK}) for every image, where this project chooses one per image"
    own = _epoch(settings, best, which)
    peers["this project, PNG shards"] = _epoch(settings, png, which)
    title = f"reading, {which} per image: {what}; CPU ms per sample, JPEG images and zstd labels unless said"
    return _compare(
        f"data, {which}", title, settings, ("this project", own), peers, notes, count=len(ShardIndex.load(best))
    )


def _shards(settings: Settings, folders: dict[int, Path], what: str) -> Comparison:
    few, *more = (
        (f"{shards} shard{'s' if shards > 1 else ''}", _epoch(settings, folder, "all tasks"))
        for shards, folder in folders.items()
    )
    count = len(ShardIndex.load(next(iter(folders.values()))))
    title = f"reading, all tasks, by number of shards: {what}; CPU ms per sample"
    return _compare("data, shards", title, settings, few, dict(more), {}, count=count)


def _compare(
    name: str,
    title: str,
    settings: Settings,
    reference: tuple[str, Callable[[int], object]],
    candidates: dict[str, Callable[[int], object]],
    notes: dict[str, str],
    *,
    count: int,
) -> Comparison:
    """Time passes over `count` samples, and return the times per sample."""
    own, others = interleave(
        reference[1],
        candidates,
        lambda number: number,
        rounds=settings.rounds or ROUNDS,
        clock=clock_for(settings.threads),
    )

    def row(label: str, timing: Timing) -> Row:
        rate = 1e3 * count / timing.milliseconds.median
        each = Quartiles(**{key: value / count for key, value in vars(timing.milliseconds).items()})
        note = "; ".join(filter(None, (f"{rate:.0f} samples per second and core", notes.get(label))))
        return Row(
            name=label,
            timing=Timing(milliseconds=each, ratio=timing.ratio, runs=timing.runs),
            saved_bytes=None,
            note=note,
        )

    return Comparison(
        name=name,
        title=title,
        dtype="fp32",
        reference=row(reference[0], own),
        rows=tuple(row(label, timing) for label, timing in others.items()),
    )


def _processes(settings: Settings, which: str, folder: Path, what: str) -> Comparison:
    """Measure the CPU time of trainer and workers per sample; the reference is what is allowed."""
    allowed = ALLOWED_MILLISECONDS[which]
    rows = []
    for workers in (2,) if settings.quick else WORKERS:
        passes = [_run_workers(settings, folder, which, workers) for _ in range(settings.rounds or ROUNDS)]
        cpu = [milliseconds for milliseconds, _ in passes]
        rate = quartiles([rate for _, rate in passes]).median
        timing = Timing(
            milliseconds=quartiles(cpu), ratio=quartiles([value / allowed for value in cpu]), runs=len(passes)
        )
        name = f"{workers} worker{'s' if workers > 1 else ''}, {which}"
        rows.append(Row(name=name, timing=timing, saved_bytes=None, note=f"{rate:.0f} samples per second"))
    exactly = Timing(milliseconds=quartiles([allowed]), ratio=quartiles([1.0]), runs=1)
    return Comparison(
        name=f"data loader, {which}",
        title=f"loader with workers, {which} per image: {what}; CPU ms of all processes per sample",
        dtype="fp32",
        reference=Row(name="allowed", timing=exactly, saved_bytes=None, note="with two workers"),
        rows=tuple(rows),
    )


def _run_workers(settings: Settings, folder: Path, which: str, workers: int) -> tuple[float, float]:
    """Return CPU milliseconds per sample and samples per second, once the workers are in their stride."""
    warm, timed = (2 * workers, 4) if settings.quick else (4 * workers, 24)
    loader = _loader(settings, folder, which, workers=workers, steps=warm + timed + 2 * workers)
    batches = iter(loader)
    for _ in range(warm):
        next(batches)
    processes = [child.pid for child in active_children() if child.pid is not None]
    begin, cpu_begin = time.perf_counter(), _cpu_seconds(processes)
    samples = sum(len(next(batches).keys) for _ in range(timed))
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds(processes) - cpu_begin
    loader.close()
    return 1e3 * cpu / samples, samples / seconds


def _cpu_seconds(processes: Sequence[int]) -> float:
    """Return the CPU time of this process and others so far.

    The clock of another process has the number that Linux's `clock_getcpuclockid` gives it.
    """
    return time.process_time() + sum(time.clock_gettime((~process << 3) | 2) for process in processes)


def _epoch(settings: Settings, folder: Path, which: str) -> Callable[[int], object]:
    """Return a pass over all samples in this process."""
    steps = len(ShardIndex.load(folder)) // _batch(settings)
    return lambda _: _drain(_loader(settings, folder, which, workers=0, steps=steps))


def _loader(settings: Settings, folder: Path, which: str, *, workers: int, steps: int) -> TrainLoader:
    index = ShardIndex.load(folder)
    return TrainLoader(
        index,
        DataConfig(tasks_per_image=_TASKS_PER_IMAGE[which], workers=workers),
        TASKS,
        images_per_step=_batch(settings),
        micro_batch=_batch(settings),
        rank=0,
        world=1,
        seed=SEED,
        cursor=Cursor.start(index, SEED),
        steps=steps,
    )


def _batch(settings: Settings) -> int:
    return 4 if settings.quick else 16


def _drain(batches: object) -> None:
    assert hasattr(batches, "__iter__")
    for _ in batches:
        pass
