"""Fairness is exact, and tasks advance together."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.assignment import (
    deal_budgets,
    fair_budgets,
    interleave,
    label_signatures,
    pace_tasks,
    rotate_tasks,
)


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
    labels, _, count = label_signatures(available)
    budget = fair_budgets(labels, count, tasks_per_image, np.ones(available.shape[1]))
    best = max(tuple(sorted(loads)) for loads in brute_force_loads(available, tasks_per_image))
    assert tuple(sorted(budget.sum(axis=0).tolist())) == best


@settings(max_examples=100, deadline=None)
@given(label_tables(images=7, tasks=4), st.integers(1, 4), st.integers(0, 2**32))
def test_loads_are_as_near_to_the_shares_as_labels_allow(
    available: NDArray[np.bool_], tasks_per_image: int, seed: int
) -> None:
    shares = np.random.default_rng(seed).uniform(0.1, 3.0, (available.shape[1],))
    labels, _, count = label_signatures(available)
    load = fair_budgets(labels, count, tasks_per_image, shares).sum(axis=0)
    possible = np.array(sorted(brute_force_loads(available, tasks_per_image)))
    assert (load**2 / shares).sum() <= (possible**2 / shares).sum(axis=1).min() * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(label_tables(), st.integers(1, 8), st.integers(0, 2**32))
def test_dealing_keeps_budgets_labels_and_set_sizes(
    available: NDArray[np.bool_], tasks_per_image: int, seed: int
) -> None:
    labels, group, count = label_signatures(available)
    np.testing.assert_array_equal(labels[group], available)
    budget = fair_budgets(labels, count, tasks_per_image, np.ones(available.shape[1]))
    served = deal_budgets(group, budget, np.random.default_rng(seed))
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


@settings(max_examples=100, deadline=None)
@given(label_tables())
def test_single_tasks_interleave_within_one_unit(available: NDArray[np.bool_]) -> None:
    served = np.zeros_like(available)
    served[np.arange(len(available)), available.argmax(axis=1)] = True
    order = interleave(served, 16)
    assert sorted(order.tolist()) == list(range(len(available)))
    assert worst_lag(served[order]) < 1 + 1e-9
    for task in range(served.shape[1]):
        mine = order[served[order, task]]
        assert (np.diff(mine) > 0).all(), "images of one task keep their order"


@pytest.mark.parametrize("tasks_per_image", [2, 4, 6])
def test_sets_with_missing_labels_interleave_evenly(tasks_per_image: int) -> None:
    rng = np.random.default_rng(0)
    present = np.array([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15])
    available = rng.random((6000, 13)) < present
    available[:, 0] |= ~available.any(axis=1)
    labels, group, count = label_signatures(available)
    budget = fair_budgets(labels, count, tasks_per_image, np.ones(13))
    settled = deal_budgets(group, budget, rng)
    order = interleave(settled, 1000)
    assert sorted(order.tolist()) == list(range(6000))
    batches = settled[order][: 6000 // 52 * 52].reshape(-1, 52, 13).sum(axis=1)
    assert np.abs(batches - 52 * settled.mean(axis=0)).max() <= 2.5
    assert np.abs(order - np.arange(6000)).max() < 2000, "images stay near their place"
