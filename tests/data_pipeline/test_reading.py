"""A batch holds exactly the bytes of its samples' members, whoever reads it."""

from typing import Any

import numpy as np
import pytest
import torch

from configs.augmentation import AugmentConfig
from configs.schema import DataConfig
from configs.tasks import resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.codecs import ImageCodec
from data_pipeline.cursor import Cursor
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.loader import TrainLoader
from data_pipeline.planning.plan import Slot
from data_pipeline.reading import read_batch
from data_pipeline.rooms.generate import make_room
from data_pipeline.shards import ShardIndex, ShardWriter, write_index

TASKS = resolve_tasks("taskonomy")
SIDE = 32
CHANGES = AugmentConfig(zoom=(0.8, 1.2), rotate_degrees=20, brightness=0.4)


@pytest.fixture(scope="module", params=["png", "best"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Rooms in the two forms that shards have: PNG throughout, and JPEG images with zstd labels."""
    folder = tmp_path_factory.mktemp(request.param)
    codecs: tuple[Any, ...] = ("zstd", ImageCodec("jpeg")) if request.param == "best" else ("png",)
    entries = []
    for shard in range(2):
        with ShardWriter(folder / f"{shard}.tar", *codecs) as writer:
            for number in range(3):
                writer.write(make_room(0, 3 * shard + number, SIDE))
        entries.append(writer.entry)
    write_index(folder, entries)
    return ShardIndex.load(folder)


def assert_equal(found: Batch, expected: Batch) -> None:
    assert found.keys == expected.keys
    for name, value in vars(expected).items():
        if name not in ("keys", "inside"):
            torch.testing.assert_close(vars(found)[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_every_member_is_where_its_pair_says(index: ShardIndex, shared: bool) -> None:
    slots = [Slot(4, (0, 3, 12), 1), Slot(0, (), 0), Slot(5, (3,), 2), Slot(2, tuple(range(13)), 0)]
    pairs = np.arange(13)
    augment = Augment(7, CHANGES)
    batch = read_batch(index, TASKS, slots, pairs, augment, shared=shared)
    for row, slot in enumerate(slots):
        np.testing.assert_array_equal(batch.images[row], index.image(slot.sample).transpose(2, 0, 1))
        np.testing.assert_array_equal(batch.mask_valid[row], index.mask_valid(slot.sample))
    expected = sorted((task, row) for row, slot in enumerate(slots) for task in slot.tasks)
    assert list(zip(batch.pair_task.tolist(), batch.pair_image.tolist(), strict=True)) == expected
    for number, spec in enumerate(TASKS):
        labels = [index.label(slots[row].sample, spec) for task, row in expected if task == number]
        assert len(batch.labels[spec.name]) == len(labels)
        for found, label in zip(batch.labels[spec.name], labels, strict=True):
            stored = label.transpose(2, 0, 1) if label.ndim == 3 else label.reshape(found.shape)
            np.testing.assert_array_equal(found, stored)
            assert found.numpy().dtype == stored.dtype
    drawn = draw_augmentations(augment, [(slot.epoch, slot.sample) for slot in slots])
    assert torch.equal(batch.crop, drawn.crop)
    assert torch.equal(batch.flip, drawn.flip)
    assert batch.rotation is not None
    assert drawn.rotation is not None
    assert torch.equal(batch.rotation, drawn.rotation)
    assert batch.global_pairs.tolist() == pairs.tolist()
    assert batch.turns.tolist() == [[4, 1], [0, 0], [5, 2], [2, 0]]


def test_a_batch_may_be_empty(index: ShardIndex) -> None:
    batch = read_batch(index, TASKS, [], np.zeros(13, np.int64), None, shared=True)
    assert batch.images.shape == (0, 3, SIDE, SIDE)
    assert batch.turns.shape == (0, 2)
    assert batch.labels["normal"].shape == (0, 3, SIDE, SIDE)
    assert batch.labels["class_scene"].shape == (0, TASKS[1].encoding.channels)


def test_workers_hand_over_the_same_bits(index: ShardIndex) -> None:
    def batches(workers: int) -> list[Batch]:
        loader = TrainLoader(
            index,
            DataConfig(tasks_per_image=2, workers=workers, augment=CHANGES),
            TASKS,
            images_per_step=4,
            micro_batch=2,
            rank=0,
            world=1,
            seed=3,
            cursor=Cursor.start(index, 3),
            steps=4,
        )
        return list(loader)

    for found, expected in zip(batches(2), batches(0), strict=True):
        assert_equal(found, expected)
