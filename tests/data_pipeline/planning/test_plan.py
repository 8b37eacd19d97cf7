"""The plan covers every sample once per epoch, serves tasks fairly, and is a pure function."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.errors import UserError
from configs.task_definitions import MOST_TASKS
from data_pipeline import node_files
from data_pipeline.planning.labels import LabelTable
from data_pipeline.planning.once import OncePlan
from data_pipeline.planning.plan import Slot


def make_plan(
    available: NDArray[np.bool_],
    tasks_per_image: int | None,
    *,
    seed: int = 0,
    shares: list[float] | None = None,
    shards: int = 5,
    window: int = 2,
) -> OncePlan:
    samples, tasks = available.shape
    return OncePlan(
        (np.arange(samples) * shards // samples).astype(np.int32),
        LabelTable.of(available),
        seed=seed,
        tasks_per_image=tasks_per_image,
        shares=shares or [1.0] * tasks,
        window=window,
    )


def count_pairs(slots: list[Slot], tasks: int) -> NDArray[np.int64]:
    return np.bincount([task for slot in slots for task in slot.tasks], minlength=tasks)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 6),
    st.integers(1, 6) | st.none(),
    st.floats(0.2, 1.0),
    st.integers(0, 2**32),
)
def test_every_sample_once_per_epoch_with_labels_it_has(
    samples: int, tasks: int, m: int | None, present: float, seed: int
) -> None:
    available = np.random.default_rng(seed).random((samples, tasks)) < present
    available[0] = True
    m = min(m, tasks) if m else None
    plan = make_plan(available, m, seed=seed)
    labelled = np.flatnonzero(available.any(axis=1))
    assert plan.unlabelled == samples - len(labelled)
    assert plan.samples_per_epoch == len(labelled)
    for epoch in range(2):
        slots = plan.slots(epoch * len(labelled), len(labelled))
        assert sorted(slot.sample for slot in slots) == labelled.tolist()
        for slot in slots:
            assert slot.epoch == epoch
            assert len(set(slot.tasks)) == len(slot.tasks)
            assert available[slot.sample, list(slot.tasks)].all()
            labels = int(available[slot.sample].sum())
            assert len(slot.tasks) == (labels if m is None else min(m, labels))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.integers(0, 500), st.integers(0, 99), st.data())
def test_complete_labels_make_every_batch_even(
    samples: int, tasks: int, batch: int, position: int, seed: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, tasks))
    plan = make_plan(np.ones((samples, tasks), bool), m, seed=seed)
    # Batches start anywhere and may span epochs.
    assert np.ptp(count_pairs(plan.slots(position, batch), tasks)) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(2, 30), st.data())
def test_shares_are_kept_in_every_prefix_of_the_stream(shares: list[int], samples: int, data: st.DataObject) -> None:
    tasks = len(shares)
    m = data.draw(st.integers(1, tasks))
    slots = make_plan(np.ones((samples, tasks), bool), m, shares=[float(share) for share in shares]).slots(0, 100)
    rate = rates(shares, m)
    for end in range(1, 101):
        assert np.abs(count_pairs(slots[:end], tasks) - rate * end).max() < 1 + 1e-9


def rates(shares: list[int], m: int) -> NDArray[np.float64]:
    """Tasks per position in proportion to the shares, none above one."""
    parts = np.array(shares, float)
    full = np.zeros(len(parts), bool)
    while True:
        rate = np.where(full, 1.0, (m - full.sum()) * parts / max(parts[~full].sum(), 1e-9))
        if (rate <= 1 + 1e-12).all():
            return rate
        full |= rate > 1


def test_a_share_doubles_a_task() -> None:
    slots = make_plan(np.ones((400, 4), bool), 1, shares=[2, 1, 1, 0]).slots(0, 400)
    assert count_pairs(slots, 4).tolist() == [200, 100, 100, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 6), st.floats(0.2, 1.0), st.integers(0, 2**32))
def test_missing_labels_with_one_task_per_image_keep_rates(samples: int, tasks: int, present: float, seed: int) -> None:
    available = np.random.default_rng(seed).random((samples, tasks)) < present
    available[0] = True
    plan = make_plan(available, 1, seed=seed)
    slots = plan.slots(0, plan.samples_per_epoch)
    total = count_pairs(slots, tasks)
    for end in range(1, len(slots) + 1):
        assert np.abs(count_pairs(slots[:end], tasks) - total * end / len(slots)).max() < 1 + 1e-9


@pytest.mark.parametrize("m", [None, 1, 2])
def test_the_stream_is_a_pure_function(m: int | None) -> None:
    available = np.random.default_rng(0).random((40, 5)) < 0.7
    available[:, 0] = True
    whole = make_plan(available, m).slots(0, 150)
    plan = make_plan(available, m)
    assert plan.samples(0, 150).tolist() == [slot.sample for slot in whole]
    pieces = [plan.slots(start, 7) for start in range(0, 147, 7)]
    assert [slot for piece in pieces for slot in piece] == whole[:147]
    assert make_plan(available, m).slots(100, 50) == whole[100:], "a position is enough to go on from"
    assert plan.slots(3, 20) == whole[3:23], "going back works as well"
    assert make_plan(available, m, seed=1).slots(0, 150) != whole
    assert [slot.sample for slot in whole[:40]] != [slot.sample for slot in whole[40:80]]


def test_samples_meet_other_tasks_in_other_epochs() -> None:
    slots = make_plan(np.ones((30, 5), bool), 1).slots(0, 30 * 20)
    met = {(slot.sample, slot.tasks) for slot in slots}
    assert len(met) > 0.95 * 30 * 5


def test_few_shards_are_in_use_at_once() -> None:
    shard_of = np.repeat(np.arange(50, dtype=np.int32), 40)
    plan = OncePlan(
        shard_of, LabelTable.of(np.ones((2000, 3), bool)), seed=0, tasks_per_image=1, shares=[1] * 3, window=4
    )
    shards = np.array([shard_of[slot.sample] for slot in plan.slots(0, 2000)])
    first = {shard: int(np.flatnonzero(shards == shard)[0]) for shard in range(50)}
    last = {shard: int(np.flatnonzero(shards == shard)[-1]) for shard in range(50)}
    in_use = [sum(first[shard] <= at <= last[shard] for shard in range(50)) for at in range(0, 2000, 20)]
    assert max(in_use) <= 6
    assert len(set(shards[:40].tolist())) > 1, "shards are mixed"
    assert list(dict.fromkeys(shards.tolist())) != sorted(set(shards.tolist())), "shards come in random order"


@pytest.mark.parametrize("m", [None, 1, 2])
@pytest.mark.parametrize("complete", [True, False])
def test_as_many_tasks_as_there_may_be(m: int | None, complete: bool) -> None:
    available = np.full((20, MOST_TASKS), complete)
    available[:10, -1] = True  # the only label of these samples, if not all exist
    available[10:15, 0] = True
    plan = make_plan(available, m)
    assert plan.samples_per_epoch == (20 if complete else 15)
    slots = plan.slots(0, plan.samples_per_epoch)
    assert sorted(slot.sample for slot in slots) == list(range(plan.samples_per_epoch))
    assert all(available[slot.sample, list(slot.tasks)].all() for slot in slots)
    served = count_pairs(slots, MOST_TASKS)
    if m is None or not complete:
        assert served[-1] == (20 if complete else 10)
    else:
        assert served.max() - served.min() <= 1


def test_impossible_plans_say_why() -> None:
    with pytest.raises(UserError, match="none of the 4 training samples"):
        make_plan(np.zeros((4, 2), bool), None)
    with pytest.raises(UserError, match="tasks_per_image is 3, but only 2 tasks"):
        make_plan(np.ones((4, 2), bool), 3)
    with pytest.raises(UserError, match="only 1 tasks have a share"):
        make_plan(np.ones((4, 2), bool), 2, shares=[1.0, 0.0])


def test_processes_share_a_large_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    available = np.random.default_rng(0).random((40, 5)) < 0.7
    available[:, 0] = True
    expected = make_plan(available, 2).slots(30, 40)
    others = [make_plan(available, m, seed=seed).slots(0, 50) for m, seed in ((1, 0), (2, 1))]
    assert not list(tmp_path.rglob("*.npy")), "small epochs touch no disk"
    monkeypatch.setattr(node_files, "SMALL_BYTES", 0)
    plan, other = make_plan(available, 2), make_plan(available, 2)
    assert plan.slots(30, 40) == other.slots(30, 40) == expected
    assert len(list(tmp_path.rglob("*.npy"))) == 2, "of both plans, two epochs"
    assert [make_plan(available, m, seed=seed).slots(0, 50) for m, seed in ((1, 0), (2, 1))] == others
    assert plan.samples(90, 1).tolist() == [slot.sample for slot in make_plan(available, 2).slots(90, 1)]
    other.close()
    assert sorted(path.stem[-2:] for path in tmp_path.rglob("*.npy")) == ["-1", "-2"], "one is looked at ahead"
    assert plan.slots(90, 1)[0].epoch == 2
    assert [path.stem[-2:] for path in tmp_path.rglob("*.npy")] == ["-2"], "epochs behind are no longer needed"
    plan.close()
    assert not list(tmp_path.rglob("*.npy"))
