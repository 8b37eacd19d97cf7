"""The same global batches on any number of ranks and workers; resuming loses and repeats nothing."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.augmentation import AugmentConfig
from configs.errors import UserError
from configs.schema import DataConfig
from configs.tasks import resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.cursor import Cursor
from data_pipeline.draws import Augment, draw_augmentations
from data_pipeline.loader import EvaluationLoader, TrainLoader
from data_pipeline.planning.dealing import deal_slots
from data_pipeline.planning.plan import Slot
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardIndex, ShardWriter, build_index, write_index
from tests.data_pipeline.loading import (
    SAMPLES,
    SEED,
    SIDE,
    TASKS,
    label_of,
    train_loader,
    write_shards,
    write_three_shards,
)

# What a batch says about one pair: sample key, task, flip, crop.
Pair = tuple[str, str, bool, tuple[float, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_shards(tmp_path_factory.mktemp("shards"))


def pairs_of(batch: Batch) -> list[Pair]:
    """Describe a batch's pairs, after checking that images and labels belong to the keys."""
    crop = [tuple(row.tolist()) for row in batch.crop]
    seen: dict[str, int] = {}
    pairs = []
    for image, task in zip(batch.pair_image.tolist(), batch.pair_task.tolist(), strict=True):
        spec, key = TASKS[task], batch.keys[image]
        row = seen.get(spec.name, 0)
        seen[spec.name] = row + 1
        assert (batch.labels[spec.name][row].to(torch.float32) == int(key[1:])).all()
        assert (batch.images[image, 0] == int(key[1:])).all()
        pairs.append((key, spec.name, bool(batch.flip[image]), crop[image]))
    assert {name: len(labels) for name, labels in batch.labels.items()} == {s.name: seen.get(s.name, 0) for s in TASKS}
    return pairs


def global_batches(folder: Path, world: int, accumulation: int, workers: int, **kwargs: object) -> list[Counter[Pair]]:
    """Union over ranks and accumulation steps, per step."""
    steps: dict[int, Counter[Pair]] = {}
    for rank in range(world):
        loader = train_loader(
            ShardIndex.load(folder),
            rank=rank,
            world=world,
            accumulation=accumulation,
            workers=workers,
            **kwargs,  # type: ignore[arg-type]
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        for number, batch in enumerate(batches):
            assert len(batch.keys) == 8 // (world * accumulation)
            steps.setdefault(number // accumulation, Counter()).update(pairs_of(batch))
    return list(steps.values())


@pytest.mark.parametrize("tasks_per_image", [None, 1, 2])
def test_global_batches_do_not_depend_on_the_world(folder: Path, tasks_per_image: int | None) -> None:
    reference = global_batches(folder, 1, 1, 0, tasks_per_image=tasks_per_image)
    assert len(reference) == 6
    for world, accumulation in ((1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
        assert global_batches(folder, world, accumulation, 0, tasks_per_image=tasks_per_image) == reference


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 2)])
def test_workers_change_nothing(folder: Path, world: int, accumulation: int) -> None:
    assert global_batches(folder, world, accumulation, 2) == global_batches(folder, 1, 1, 0)


@settings(max_examples=25, deadline=None)
@given(
    present=st.floats(0.1, 1.0),
    shards=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    world=st.sampled_from([1, 2, 4, 8]),
    accumulation=st.sampled_from([1, 2, 4, 8]),
    tasks_per_image=st.sampled_from([None, 1, 2, 3]),
    done=st.integers(0, 5),
)
def test_any_labels_any_world_any_resume(
    present: float, shards: int, seed: int, world: int, accumulation: int, tasks_per_image: int | None, done: int
) -> None:
    available = np.random.default_rng(seed).random((SAMPLES, len(TASKS))) < present
    available[0] = True
    with TemporaryDirectory() as folder:
        write_shards(Path(folder), available, shards)
        reference = global_batches(Path(folder), 1, 1, 0, tasks_per_image=tasks_per_image)
        cursor = Cursor.start(ShardIndex.load(folder), SEED).advanced(done * 8)
        accumulation = min(accumulation, 8 // world)
        resumed = global_batches(
            Path(folder), world, accumulation, 0, tasks_per_image=tasks_per_image, cursor=cursor, steps=6 - done
        )
    assert resumed == reference[done:]
    for key, task, *_ in (pair for step in reference for pair in step.elements()):
        assert available[int(key[1:]), [spec.name for spec in TASKS].index(task)]


def test_resuming_on_another_world_continues_the_stream(folder: Path) -> None:
    whole = global_batches(folder, 2, 1, 0, steps=7)
    index = ShardIndex.load(folder)
    cursor = Cursor.from_dict(Cursor.start(index, SEED).advanced(3 * 8).to_dict())
    assert global_batches(folder, 4, 2, 0, steps=4, cursor=cursor) == whole[3:]
    # 22 of the 23 samples have a label: 11 steps of 8 are 4 epochs.
    seen = Counter(key for step in global_batches(folder, 1, 1, 0, steps=11) for key, *_ in step.elements())
    assert seen == Counter({f"k{number}": 4 for number in range(SAMPLES - 1)})
    assert train_loader(index).plan.unlabelled == 1


def test_batches_are_in_stored_form(folder: Path) -> None:
    batch = next(iter(train_loader(ShardIndex.load(folder), tasks_per_image=None)))
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, SIDE, SIDE), torch.uint8)
    assert (batch.mask_valid.shape, batch.mask_valid.dtype) == ((8, SIDE, SIDE), torch.bool)
    assert batch.labels["depth_zbuffer"].dtype == torch.uint16
    assert batch.labels["depth_zbuffer"].shape == (8, 1, SIDE, SIDE)
    assert batch.labels["normal"].shape[1:] == (3, SIDE, SIDE)
    assert (batch.labels["class_scene"].shape, batch.labels["class_scene"].dtype) == ((8, 365), torch.float32)
    order = list(zip(batch.pair_task.tolist(), batch.pair_image.tolist(), strict=True))
    assert order == sorted(order)
    assert batch.global_pairs.tolist() == torch.bincount(batch.pair_task, minlength=3).tolist()
    assert [bool(mask.all()) for mask in batch.mask_valid] == [key != "k1" for key in batch.keys]
    inside = batch.crop[:, :2] + batch.crop[:, 2:]
    assert (batch.crop >= 0).all()
    assert (inside <= 1 + 1e-6).all()
    assert (batch.crop[:, 2] >= 0.7 - 1e-6).all()


def test_global_pairs_count_all_ranks(folder: Path) -> None:
    ranks = [list(train_loader(ShardIndex.load(folder), rank=rank, world=2, accumulation=2)) for rank in range(2)]
    for step in range(6):
        parts = [batch for batches in ranks for batch in batches[2 * step : 2 * step + 2]]
        counted = sum(torch.bincount(batch.pair_task, minlength=3) for batch in parts)
        assert all(batch.global_pairs.tolist() == torch.as_tensor(counted).tolist() for batch in parts)


def test_augmentation_differs_between_epochs_and_can_be_off(folder: Path) -> None:
    steps = global_batches(folder, 1, 1, 0, steps=11)
    draws = Counter((key, flip, crop) for step in steps for key, _, flip, crop in step)
    assert max(draws.values()) == 1
    assert 0.3 < sum(flip for _, flip, _ in draws) / len(draws) < 0.7
    index = ShardIndex.load(folder)
    config = DataConfig(workers=0, augment=AugmentConfig(flip=False, crop_scale=(1.0, 1.0)))
    plain = TrainLoader(
        index, config, TASKS, images_per_step=8, micro_batch=8, rank=0, world=1, seed=0,
        cursor=Cursor.start(index, 0), steps=2,
    )  # fmt: skip
    for batch in plain:
        assert not batch.flip.any()
        assert batch.crop.tolist() == [[0, 0, 1, 1]] * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_and_colours_are_those_of_the_sample_wherever_it_is_read(folder: Path, workers: int) -> None:
    augment = AugmentConfig(zoom=(0.5, 1.0), rotate_degrees=20, brightness=0.4, hue=0.1)
    seen = []
    for rank in range(2):
        index = ShardIndex.load(folder)
        loader = TrainLoader(
            index, DataConfig(workers=workers, augment=augment), TASKS, images_per_step=8, micro_batch=2, rank=rank,
            world=2, seed=4, cursor=Cursor.start(index, 4), steps=2,
        )  # fmt: skip
        for batch in loader:
            assert list(batch.photometric) == ["brightness", "hue"]
            samples = [(0, index.keys.index(key)) for key in batch.keys]
            expected = draw_augmentations(Augment(4, augment), samples)
            assert batch.rotation is not None
            assert expected.rotation is not None
            assert torch.equal(batch.rotation, expected.rotation)
            assert torch.equal(batch.crop, expected.crop)
            for name, strength in batch.photometric.items():
                assert torch.equal(strength, expected.photometric[name])
            seen += samples
    assert len(set(seen)) == len(seen) == 16


def test_dealing_mixes_tasks() -> None:
    slots = [Slot(sample, (sample // 4,), 0) for sample in range(16)]
    for part in deal_slots(slots, 4):
        assert sorted(slot.tasks for slot in part) == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("world", "workers", "limit"), [(1, 0, None), (2, 2, None), (4, 0, None), (3, 0, 10), (4, 0, 3)]
)
def test_evaluation_sees_every_sample_once(folder: Path, world: int, workers: int, limit: int | None) -> None:
    index = ShardIndex.load(folder)
    keys: list[str] = []
    pairs: Counter[str] = Counter()
    lengths = set()
    told: list[list[list[int]]] = []
    counted = 0
    for rank in range(world):
        loader = EvaluationLoader(index, TASKS, batch_size=3, rank=rank, world=world, limit=limit, workers=workers)
        batches = list(loader)
        lengths.add(len(batches))
        assert len(loader) == len(batches)
        told.append([batch.global_pairs.tolist() for batch in batches])
        counted = counted + np.array([torch.bincount(batch.pair_task, minlength=3).tolist() for batch in batches])
        for batch in batches:
            keys += batch.keys
            pairs.update(task for _, task, *_ in pairs_of(batch))
            assert not batch.flip.any()
            assert (batch.crop == torch.tensor([0.0, 0, 1, 1])).all()
            assert batch.images.shape[1:] == (3, SIDE, SIDE)
            assert batch.labels["normal"].shape[1:] == (3, SIDE, SIDE)
    expected = list(index.keys[:limit])
    assert sorted(keys) == sorted(expected)
    assert len(lengths) == 1
    assert told == [np.asarray(counted).tolist()] * world, "global_pairs are the pairs of all ranks in this turn"
    labels = index.available([spec.name for spec in TASKS])[: len(expected)].sum(axis=0)
    assert [pairs[spec.name] for spec in TASKS] == labels.tolist()


@pytest.mark.parametrize("limit", [1, 10, 22, 23, 100, None])
def test_a_spread_evaluation_sees_samples_from_all_over(folder: Path, limit: int | None) -> None:
    index = ShardIndex.load(folder)
    count = min(limit or SAMPLES, SAMPLES)
    keys = []
    for rank in range(2):
        loader = EvaluationLoader(index, TASKS, batch_size=3, rank=rank, world=2, limit=limit, workers=0, spread=True)
        keys += [key for batch in loader for key in batch.keys]
    seen = sorted(index.keys.index(key) for key in keys)
    assert len(seen) == len(set(seen)) == count
    assert max(np.diff([*seen, SAMPLES])) <= -(-SAMPLES // count)


def bad_shards(path: Path, tasks: Sequence[str], member: str) -> ShardIndex:
    """One good shard, then damaged bytes in `member` of its last sample."""
    with ShardWriter(path / "a.tar") as writer:
        for number in range(4):
            labels = {task: label_of(number, spec) for task, spec in zip(tasks, resolve_tasks(tasks), strict=True)}
            writer.write(Sample(key=f"k{number}", rgb=np.zeros((SIDE, SIDE, 3), np.uint8), labels=labels))
    write_index(path, [writer.entry])
    index = ShardIndex.load(path)
    members = writer.entry.members[member]
    with (path / "a.tar").open("r+b") as file:
        file.seek(members.offset[3] + 30)
        file.write(b"\xff" * (members.size[3] - 30))
    return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_member_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    index = bad_shards(tmp_path, ["normal"], "normal.png")
    loader = EvaluationLoader(
        index, resolve_tasks(["normal"]), batch_size=1, rank=0, world=1, limit=None, workers=workers
    )
    batches = iter(loader)
    for number in range(3):
        assert next(batches).keys == (f"k{number}",)
    with pytest.raises(UserError, match=r"^shard .*a.tar, sample k3, member normal is damaged") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_label_of_the_wrong_depth_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        depth = label_of(1, resolve_tasks("depth_zbuffer")[0])
        writer.write(Sample(key="k", rgb=np.zeros((SIDE, SIDE, 3), np.uint8), labels={"depth_zbuffer": depth}))
    data = (tmp_path / "a.tar").read_bytes().replace(b"k.depth_zbuffer.png", b"k.segment_unsup.png")
    assert b"depth" not in data
    # Give the 16-bit member the name of an 8-bit task; the tar's header needs its checksum again.
    header = data.index(b"k.segment_unsup.png")
    block = bytearray(data[header : header + 512])
    block[:100] = b"k.segment_unsup2d.png".ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a.tar").write_bytes(data[:header] + bytes(block) + data[header + 512 :])
    build_index(tmp_path)
    index = ShardIndex.load(tmp_path)
    loader = EvaluationLoader(
        index, resolve_tasks(["segment_unsup2d"]), batch_size=1, rank=0, world=1, limit=None, workers=0
    )
    with pytest.raises(UserError, match=r"a.tar, sample k, member segment_unsup2d is uint16 .* stores uint8"):
        next(iter(loader))


def test_impossible_batches_and_foreign_cursors_are_refused(folder: Path) -> None:
    index = ShardIndex.load(folder)
    with pytest.raises(UserError, match="changed since the checkpoint"):
        train_loader(index, cursor=Cursor(0, SEED, "other"))
    with pytest.raises(UserError, match=r"images_per_step 8 is not a multiple of micro_batch 2 x 3"):
        train_loader(index, world=3)
    with pytest.raises(UserError, match="none of the 23 training samples"):
        TrainLoader(
            index, DataConfig(), resolve_tasks(["edges"]), images_per_step=8, micro_batch=8, rank=0, world=1,
            seed=0, cursor=Cursor.start(index, 0), steps=1,
        )  # fmt: skip


def test_a_new_iteration_ends_the_one_before(folder: Path) -> None:
    loader = train_loader(ShardIndex.load(folder))
    old = iter(loader)
    first = next(old)
    new = iter(loader)
    assert next(new).keys == first.keys
    assert next(old, None) is None
    del old
    assert len(list(new)) == 5


def test_loading_leaves_the_global_random_numbers_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    assert len(list(train_loader(ShardIndex.load(folder)))) == 6
    assert torch.equal(torch.random.get_rng_state(), before)
