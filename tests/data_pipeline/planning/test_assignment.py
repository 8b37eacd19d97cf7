"""Fairness is exact, and tasks advance together."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.planning.assignment import (
    deal_budgets,
    fair_budgets,
    label_signatures,
    pace_tasks,
    rotate_tasks,
)
from data_pipeline.planning.labels import pack_codes, unpack_codes


@st.composite
def label_tables(draw: st.DrawFn, images: int = 60, tasks: int = 7) -> NDArray[np.bool_]:
    """(N, T) of which label exists; every image has one."""
    count, width = draw(st.integers(1, images)), draw(st.integers(1, tasks))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table = rng.random((count, width)) < rng.uniform(0.05, 1.0, width)
    table[~table.any(axis=1), rng.integers(width)] = True
    return table


def worst_lag(served: NDArray[np.bool_]) -> float:
    """Largest distance, over prefixes and tasks, between what a task had and its rate so far."""
    position = np.arange(1, len(served) + 1)[:, None]
    return float(np.abs(np.cumsum(served, axis=0) - position * served.mean(axis=0)).max())


def signatures(available: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    sets, group, count = label_signatures(pack_codes(available))
    return unpack_codes(sets, available.shape[1]), group, count


def brute_force_loads(available: NDArray[np.bool_], tasks_per_image: int) -> set[tuple[int, ...]]:
    """Every load vector that some choice of tasks gives."""
    loads = {(0,) * available.shape[1]}
    for row in available:
        labels = np.flatnonzero(row)
        sets = itertools.combinations(labels, min(tasks_per_image, len(labels)))
        choices = [tuple(int(t in chosen) for t in range(len(row))) for chosen in sets]
        loads = {tuple(map(sum, zip(load, choice, strict=True))) for load in loads for choice in choices}
    return loads


@settings(max_examples=150, deadline=None)
@given(label_tables(images=7, tasks=4), st.integers(1, 4))
def test_loads_are_max_min_fair(available: NDArray[np.bool_], tasks_per_image: int) -> None:
    labels, _, count = signatures(available)
    budget = fair_budgets(labels, count, tasks_per_image, np.ones(available.shape[1]))
    best = max(tuple(sorted(loads)) for loads in brute_force_loads(available, tasks_per_image))
    assert tuple(sorted(budget.sum(axis=0).tolist())) == best


@settings(max_examples=100, deadline=None)
@given(label_tables(images=7, tasks=4), st.integers(1, 4), st.integers(0, 2**32))
def test_loads_are_as_near_to_the_shares_as_labels_allow(
    available: NDArray[np.bool_], tasks_per_image: int, seed: int
) -> None:
    shares = np.random.default_rng(seed).uniform(0.1, 3.0, (available.shape[1],))
    labels, _, count = signatures(available)
    load = fair_budgets(labels, count, tasks_per_image, shares).sum(axis=0)
    possible = np.array(sorted(brute_force_loads(available, tasks_per_image)))
    assert (load**2 / shares).sum() <= (possible**2 / shares).sum(axis=1).min() * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(label_tables(), st.integers(1, 8), st.integers(0, 2**32))
def test_dealing_keeps_budgets_labels_and_set_sizes(
    available: NDArray[np.bool_], tasks_per_image: int, seed: int
) -> None:
    labels, group, count = signatures(available)
    np.testing.assert_array_equal(labels[group], available)
    budget = fair_budgets(labels, count, tasks_per_image, np.ones(available.shape[1]))
    served = unpack_codes(deal_budgets(group, budget, np.random.default_rng(seed)), available.shape[1])
    assert not (served & ~available).any()
    np.testing.assert_array_equal(served.sum(axis=1), np.minimum(tasks_per_image, available.sum(axis=1)))
    np.testing.assert_array_equal(served.sum(axis=0), budget.sum(axis=0))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 120), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_paced_tasks_stay_within_one_unit_of_their_rate(positions: int, tasks: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = min(m, tasks)
    shares = rng.uniform(0.05, 3.0, tasks) ** 2
    load = fair_budgets(np.ones((1, tasks), bool), np.array([positions]), m, shares)[0]
    served = pace_tasks(load, positions)
    assert (served.sum(axis=1) == m).all()
    np.testing.assert_array_equal(served.sum(axis=0), load)
    assert worst_lag(served) < 1 + 1e-9


@given(st.integers(0, 10**9), st.integers(1, 60), st.integers(1, 9), st.data())
def test_every_run_of_a_rotation_is_even(first: int, count: int, tasks: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, tasks))
    loads = np.bincount(rotate_tasks(first, count, m, tasks).ravel(), minlength=tasks)
    assert loads.sum() == count * m
    assert np.ptp(loads) <= 1


def test_tasks_are_dealt_evenly_along_the_order() -> None:
    budget = np.array([[600, 300, 100]])
    served = unpack_codes(deal_budgets(np.zeros(1000, np.int64), budget, np.random.default_rng(0)), 3)
    assert worst_lag(served) < 4, "of a random order, about 15"
