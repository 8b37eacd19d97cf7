"""Dealing moves pairs between ranks; it neither loses nor repeats any."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.planning.dealing import TaskHomes, deal_pairs
from data_pipeline.planning.plan import Slot

TASKS = 5
slots_of_batch = st.lists(
    st.sets(st.integers(0, TASKS - 1), min_size=1).map(lambda tasks: tuple(sorted(tasks))), min_size=1, max_size=20
).map(lambda served: [Slot(sample, tasks, sample % 2) for sample, tasks in enumerate(served)])


@given(slots_of_batch, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.permutations(range(TASKS)))
def test_every_pair_once_and_equally_many_for_each(
    slots: list[Slot], ranks: int, copies: int, order: list[int]
) -> None:
    dealt = deal_pairs(slots, ranks * copies, TaskHomes(ranks, tuple(order)))
    assert len(dealt) == ranks * copies
    counts = [sum(len(slot.tasks) for slot in part) for part in dealt]
    assert max(counts) - min(counts) <= 1
    got = Counter((slot.sample, slot.epoch, task) for part in dealt for slot in part for task in slot.tasks)
    assert got == Counter((slot.sample, slot.epoch, task) for slot in slots for task in slot.tasks)
    for part in dealt:
        assert len({slot.sample for slot in part}) == len(part), "an image is decoded once"
        assert all(list(slot.tasks) == sorted(slot.tasks) for slot in part)


@given(slots_of_batch, st.sampled_from([2, 4]), st.integers(1, 3), st.permutations(range(TASKS)))
def test_tasks_stay_together(slots: list[Slot], ranks: int, copies: int, order: list[int]) -> None:
    dealt = deal_pairs(slots, ranks * copies, TaskHomes(ranks, tuple(order)))
    turns = [
        [order.index(task) for part in dealt[home::ranks] for slot in part for task in slot.tasks]
        for home in range(ranks)
    ]
    for here, next_one in itertools.pairwise(turns):
        assert not here or not next_one or max(here) <= min(next_one)


def test_images_stay_whole_where_they_can() -> None:
    slots = [Slot(sample, (0, 1, 2, 3), 0) for sample in range(4)]
    dealt = deal_pairs(slots, 4, TaskHomes(2, (2, 0, 3, 1)))
    assert dealt[0] == (Slot(0, (0, 2), 0), Slot(1, (0, 2), 0))
    assert dealt[1] == (Slot(0, (1, 3), 0), Slot(1, (1, 3), 0))
    assert dealt[2] == (Slot(2, (0, 2), 0), Slot(3, (0, 2), 0))
