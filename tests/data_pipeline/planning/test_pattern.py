"""The pattern of tasks keeps shares exactly over its period, and nearly everywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.planning.pattern import MAX_PERIOD, TaskPattern


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=7).filter(any), st.data())
def test_shares_are_exact_over_a_period_and_near_in_every_prefix(shares: list[int], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, sum(share > 0 for share in shares)))
    pattern = TaskPattern(shares, m)
    assert pattern.tasks.shape == pattern.unit.shape == (pattern.period, m)
    served = (pattern.tasks[:, :, None] == np.arange(len(shares))).sum(axis=1)
    assert served.max() == 1, "distinct tasks"
    load = served.sum(axis=0)
    np.testing.assert_array_equal(load, pattern.load)
    position = np.arange(1, pattern.period + 1)[:, None]
    assert np.abs(np.cumsum(served, axis=0) - position * load / pattern.period).max() < 1 + 1e-9
    full = load == pattern.period
    for one, other in itertools.permutations(np.flatnonzero(np.array(shares) > 0).tolist(), 2):
        if not full[one] and not full[other]:
            assert load[one] * shares[other] == load[other] * shares[one], "in proportion"
        if full[one]:
            assert load[other] * shares[one] <= load[one] * shares[other] or full[other] or shares[one] >= shares[other]
    before: dict[int, int] = {}
    for turn, units in zip(pattern.tasks.tolist(), pattern.unit.tolist(), strict=True):
        for task, unit in zip(turn, units, strict=True):
            assert unit == before.get(task, 0)
            before[task] = unit + 1


@given(st.integers(1, 13), st.data())
def test_equal_shares_are_even_in_any_run(tasks: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, tasks))
    pattern = TaskPattern([0.7] * tasks, m)
    assert pattern.period == (tasks if m == 1 else pattern.period) <= tasks
    first, count = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 50))
    run = pattern.tasks[np.arange(first, first + count) % pattern.period]
    assert np.ptp(np.bincount(run.ravel(), minlength=tasks)) <= 1


def test_decimals_are_meant_as_written() -> None:
    assert TaskPattern([0.1, 0.2, 0.7], 1).load.tolist() == [1, 2, 7]
    assert TaskPattern([1.5, 1, 0, 1], 1).load.tolist() == [3, 2, 0, 2]
    assert TaskPattern([5, 1, 1], 2).load.tolist() == [2, 1, 1], "no task twice at a position"
    assert TaskPattern([1, 1, 2, 2], 2).load.tolist() == [1, 1, 2, 2], "the shortest period, 3"


@pytest.mark.parametrize("m", [1, 3])
def test_awkward_shares_are_rounded_and_none_vanishes(m: int) -> None:
    shares = [np.pi, 1.0, np.e, 1e-9, 0.1234567]
    pattern = TaskPattern(shares, m)
    assert pattern.period == MAX_PERIOD
    assert pattern.load[3] == 1
    assert pattern.load.max() <= MAX_PERIOD
    assert pattern.load.sum() == m * MAX_PERIOD
    if m == 1:
        assert np.abs(pattern.load / MAX_PERIOD - np.array(shares) / sum(shares)).max() < 1e-3
