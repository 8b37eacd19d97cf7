"""Small shards whose labels tell their sample, and a loader over them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.schema import DataConfig
from configs.tasks import TaskSpec, resolve_tasks
from data_pipeline.cursor import Cursor
from data_pipeline.loader import TrainLoader
from data_pipeline.sample import AnyArray, Sample
from data_pipeline.shards import ShardIndex, ShardWriter, write_index

SIDE = 4
SAMPLES = 23
TASKS = resolve_tasks(["class_scene", "depth_zbuffer", "normal"])
SEED = 5


def label_of(number: int, spec: TaskSpec) -> AnyArray:
    """A label that tells its sample."""
    if not spec.dense:
        return np.full(spec.encoding.channels, number, np.float32)
    channels = () if spec.encoding.channels == 1 else (spec.encoding.channels,)
    return np.full((SIDE, SIDE, *channels), number, spec.encoding.dtype)


def write_three_shards(path: Path) -> Path:
    """Three shards; every third sample lacks normals, the last one has no label at all."""
    available = np.ones((SAMPLES, len(TASKS)), np.bool_)
    available[::3, 2] = False
    available[-1] = False
    write_shards(path, available, 3)
    return path


def write_shards(path: Path, available: NDArray[np.bool_], shards: int) -> None:
    """Write one sample per row; `available` (SAMPLES, tasks) says which labels it has."""
    entries = []
    for shard in range(shards):
        with ShardWriter(path / f"{shard}.tar") as writer:
            for number in range(shard, SAMPLES, shards):
                specs = [spec for spec, has in zip(TASKS, available[number], strict=True) if has]
                labels = {spec.name: label_of(number, spec) for spec in specs}
                mask = np.zeros((SIDE, SIDE), np.uint8) if number == 1 else None
                rgb = np.full((SIDE, SIDE, 3), (number, 1, 2), np.uint8)
                writer.write(Sample(key=f"k{number}", rgb=rgb, labels=labels, mask_valid=mask))
        entries.append(writer.entry)
    write_index(path, entries)


def train_loader(
    index: ShardIndex,
    *,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    steps: int = 6,
    cursor: Cursor | None = None,
    tasks_per_image: int | None = 1,
) -> TrainLoader:
    return TrainLoader(
        index,
        DataConfig(tasks_per_image=tasks_per_image, workers=workers, shuffle_window_shards=2),
        TASKS,
        images_per_step=8,
        micro_batch=8 // (world * accumulation),
        rank=rank,
        world=world,
        seed=SEED,
        cursor=cursor or Cursor.start(index, SEED),
        steps=steps,
    )
