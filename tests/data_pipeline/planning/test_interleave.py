"""Images whose tasks are settled come in an order in which all tasks advance together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.planning import interleave as module
from data_pipeline.planning.assignment import deal_budgets, fair_budgets, label_signatures
from data_pipeline.planning.interleave import interleave, pace_single
from data_pipeline.planning.labels import Codes, pack_codes, unpack_codes


def worst_lag(served: NDArray[np.bool_]) -> float:
    """Largest distance, over prefixes and tasks, between what a task had and its rate so far."""
    position = np.arange(1, len(served) + 1)[:, None]
    return float(np.abs(np.cumsum(served, axis=0) - position * served.mean(axis=0)).max())


def settled_sets(images: int, tasks_per_image: int) -> Codes:
    rng = np.random.default_rng(0)
    present = np.array([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15])
    sets, group, count = label_signatures(pack_codes(rng.random((images, 13)) < present))
    budget = fair_budgets(unpack_codes(sets, 13), count, tasks_per_image, np.ones(13))
    return deal_budgets(group, budget, rng)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 70))
def test_paced_tasks_stay_within_one_unit_of_their_rate(loads: list[int], block: int) -> None:
    load = np.array([*loads, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        paced = pace_single(load)
    np.testing.assert_array_equal(np.bincount(paced, minlength=len(load)), load)
    assert worst_lag(paced[:, None] == np.arange(len(load))) < 1 + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_single_tasks_interleave_within_one_unit(tasks: list[int]) -> None:
    served = np.array(tasks)[:, None] == np.arange(7)
    order = interleave(pack_codes(served), 7, 16)
    assert sorted(order.tolist()) == list(range(len(tasks)))
    assert worst_lag(served[order]) < 1 + 1e-9
    for task in range(7):
        assert (np.diff(order[served[order, task]]) > 0).all(), "images of one task keep their order"


@pytest.mark.parametrize("tasks_per_image", [2, 4, 6])
@pytest.mark.parametrize("piece", [2500, 65536])
def test_sets_with_missing_labels_interleave_evenly(
    tasks_per_image: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    settled = settled_sets(6001, tasks_per_image)
    order = interleave(settled, 13, 1000)
    assert sorted(order.tolist()) == list(range(6001))
    served = unpack_codes(settled, 13)
    batches = served[order][: 6001 // 52 * 52].reshape(-1, 52, 13).sum(axis=1)
    assert np.abs(batches - 52 * served.mean(axis=0)).max() <= 3
    assert np.abs(order - np.arange(6001)).max() < 2000, "images stay near their place"


def test_pieces_are_ordered_as_each_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = settled_sets(601, 4)
    halves = [settled[:300], settled[300:]]
    alone = [interleave(half, 13, 50) + 300 * number for number, half in enumerate(halves)]
    monkeypatch.setattr(module, "_PIECE", 300)
    np.testing.assert_array_equal(interleave(settled, 13, 50), np.concatenate(alone))
