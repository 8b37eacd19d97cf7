"""Quotas are exact in every batch, every pass is a permutation, and a position is enough to go on from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import DataConfig
from data_pipeline.cursor import Cursor
from data_pipeline.loader import TrainLoader
from data_pipeline.planning.labels import LabelTable
from data_pipeline.planning.plan import Slot
from data_pipeline.planning.quota import QuotaPlan
from data_pipeline.shards import ShardIndex
from tests.data_pipeline.loading import SEED, TASKS, write_three_shards


def make_plan(
    available: NDArray[np.bool_], sizes: list[int] | None = None, *, shares: list[float] | None = None, window: int = 2
) -> QuotaPlan:
    samples, tasks = available.shape
    return QuotaPlan(
        np.repeat(np.arange(len(sizes or [samples]), dtype=np.int32), sizes or [samples]),
        LabelTable.of(available),
        seed=3,
        shares=shares or [1.0] * tasks,
        window=window,
        task_names=[f"task{task}" for task in range(tasks)],
    )


def count_tasks(slots: list[Slot], tasks: int) -> NDArray[np.int64]:
    return np.bincount([task for slot in slots for task in slot.tasks], minlength=tasks)


@st.composite
def label_tables(draw: st.DrawFn) -> tuple[NDArray[np.bool_], list[int]]:
    """(N, T) of which label exists, each at least once, and the sizes of shards."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    tasks = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table = rng.random((sum(sizes), tasks)) < rng.uniform(0.0, 1.0, tasks)
    table[rng.integers(len(table), size=tasks), np.arange(tasks)] = True
    return table, sizes


@settings(max_examples=60, deadline=None)
@given(label_tables(), st.integers(1, 4))
def test_every_pass_is_a_permutation_of_the_labelled_samples(
    data: tuple[NDArray[np.bool_], list[int]], window: int
) -> None:
    available, sizes = data
    samples, tasks = available.shape
    slots = make_plan(available, sizes, window=window).slots(0, 2 * samples * tasks)
    for task in range(tasks):
        turns = [slot for slot in slots if slot.tasks == (task,)]
        labelled = np.flatnonzero(available[:, task]).tolist()
        for number in range(len(turns) // len(labelled)):
            walk = turns[number * len(labelled) :][: len(labelled)]
            assert sorted(slot.sample for slot in walk) == labelled, "rare tasks wrap"
            assert {slot.epoch for slot in walk} == {number}


@settings(max_examples=60, deadline=None)
@given(label_tables(), st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(0, 10**12), st.integers(1, 9))
def test_shares_are_exact_in_whole_periods_and_near_in_any_batch(
    data: tuple[NDArray[np.bool_], list[int]], shares: list[int], position: int, batch: int
) -> None:
    available, sizes = data
    tasks = available.shape[1]
    whole = np.array(shares[:tasks]) // np.gcd.reduce(shares[:tasks])
    plan = make_plan(available, sizes, shares=[float(share) for share in whole])
    period = int(whole.sum())
    np.testing.assert_array_equal(count_tasks(plan.slots(position, batch * period), tasks), batch * whole)
    deviation = np.abs(count_tasks(plan.slots(position, batch), tasks) - batch * whole / period).max()
    assert deviation < 2
    if len(set(shares[:tasks])) == 1:
        assert deviation < 1


@settings(max_examples=60, deadline=None)
@given(label_tables(), st.integers(0, 10**9), st.integers(1, 20), st.integers(0, 20))
def test_the_stream_is_a_pure_function_of_the_position(
    data: tuple[NDArray[np.bool_], list[int]], position: int, count: int, jump: int
) -> None:
    available, sizes = data
    whole = make_plan(available, sizes).slots(position, count + jump)
    assert make_plan(available, sizes).samples(position, count + jump).tolist() == [slot.sample for slot in whole]
    plan = make_plan(available, sizes)
    assert plan.slots(position + jump, count) == whole[jump:], "a position is enough to go on from"
    assert plan.slots(position, count + jump) == whole, "going back works as well"
    assert all(available[slot.sample, slot.tasks[0]] for slot in whole)


def test_tasks_walk_through_the_same_few_shards() -> None:
    sizes = [40] * 50
    shard_of = np.repeat(np.arange(50), sizes)
    plan = make_plan(np.ones((2000, 3), bool), sizes, window=5)
    slots = plan.slots(0, 6000)
    shards = shard_of[[slot.sample for slot in slots]].reshape(10, 600)
    assert {len(set(block.tolist())) for block in shards} == {5}
    order = {task: [slot.sample for slot in slots if slot.tasks == (task,)] for task in range(3)}
    assert order[0] != order[1], "in an order of its own"
    passes = [slot.sample for slot in plan.slots(6000, 6000) if slot.tasks == (0,)]
    assert set(shard_of[passes[:200]]) != set(shard_of[order[0][:200]]), "other shards come first in other passes"
    whole = make_plan(np.ones((20, 1), bool), window=1).slots(0, 40)
    assert [slot.sample for slot in whole[:20]] != [slot.sample for slot in whole[20:]], (
        "in another order in every pass"
    )


def test_tasks_without_a_share_need_no_labels() -> None:
    available = np.array([[True, False], [True, False], [False, True]])
    plan = make_plan(available, shares=[1.0, 0.0])
    assert plan.unlabelled == 1
    assert count_tasks(plan.slots(0, 10), 2).tolist() == [10, 0]


def test_impossible_quotas_say_why() -> None:
    with pytest.raises(UserError, match="none of the 4 training samples has a label of any"):
        make_plan(np.zeros((4, 2), bool))
    with pytest.raises(UserError, match=r"has a label of task1, .* set data.task_shares.task1=0"):
        make_plan(np.array([[True, False]] * 3))
    with pytest.raises(UserError, match="0 for every task"):
        make_plan(np.ones((4, 2), bool), shares=[0.0, 0.0])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return ShardIndex.load(write_three_shards(tmp_path_factory.mktemp("shards")))


def quota_loader(
    index: ShardIndex, *, rank: int = 0, world: int = 1, accumulation: int = 1, workers: int = 0, position: int = 0
) -> TrainLoader:
    return TrainLoader(
        index,
        DataConfig(balance="quota", workers=workers, shuffle_window_shards=2),
        TASKS,
        images_per_step=12,
        micro_batch=12 // (world * accumulation),
        rank=rank,
        world=world,
        seed=SEED,
        cursor=Cursor.start(index, SEED).advanced(position),
        steps=4,
    )


def pairs_of_steps(index: ShardIndex, world: int, accumulation: int, **options: int) -> list[list[tuple[str, int]]]:
    """The (key, task) pairs of every global batch, sorted."""
    steps: list[list[tuple[str, int]]] = [[] for _ in range(4)]
    for rank in range(world):
        loader = quota_loader(index, rank=rank, world=world, accumulation=accumulation, **options)
        for number, batch in enumerate(loader):
            assert batch.global_pairs.tolist() == [4, 4, 4]
            pairs = zip(batch.pair_image.tolist(), batch.pair_task.tolist(), strict=True)
            steps[number // accumulation] += [(batch.keys[image], task) for image, task in pairs]
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(2, 1, 0), (3, 2, 0), (1, 3, 1), (4, 3, 0)])
def test_any_world_reads_the_same_global_batches(
    index: ShardIndex, world: int, accumulation: int, workers: int
) -> None:
    assert pairs_of_steps(index, world, accumulation, workers=workers) == pairs_of_steps(index, 1, 1)


def test_another_world_goes_on_exactly(index: ShardIndex) -> None:
    first, rest = pairs_of_steps(index, 2, 1), pairs_of_steps(index, 3, 2, position=24)
    assert rest[:2] == first[2:]
