"""Task-affine placement: valid for any use, best where the best is known, never at the price of overload."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import LOAD_LIMIT, Floats, LayerUse, home_shares, place, rank_loads


def random_use(seed: int, tasks: int, experts: int, top_k: int) -> LayerUse:
    """Tasks that use `top_k` experts nearly always."""
    rng = np.random.default_rng(seed)
    shares = np.full((tasks, experts), 0.0)
    for row in shares:
        row[rng.choice(experts, top_k, replace=False)] = 1.0
    return LayerUse(shares_TE=shares, row_bytes=8.0, choice_bytes=float(seed % 2))


def expected_bytes(uses: dict[str, LayerUse], placed: dict[str, tuple[int, ...]], home_TR: Floats) -> float:
    """By the definition, for shares of 0 and 1: every task's token visits the ranks of its experts."""
    ranks, total = home_TR.shape[1], 0.0
    for name, use in uses.items():
        holds = np.reshape(placed[name], (ranks, -1))
        for task, home in itertools.product(range(len(home_TR)), range(ranks)):
            away = [use.shares_TE[task, holds[rank]].sum() for rank in range(ranks) if rank != home]
            visits = sum(choices > 0 for choices in away)
            total += home_TR[task, home] * (visits * use.row_bytes + sum(away) * use.choice_bytes)
    return total


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_any_use_is_placed(seed: int, tasks: int, ranks: int, top_k: int) -> None:
    uses = {"a": random_use(seed, tasks, 8, top_k), "b": random_use(seed + 1, tasks, 16, 1)}
    weights = np.random.default_rng(seed).random(tasks) + 0.1
    found = place(uses, weights.tolist(), ranks)
    assert sorted(found.task_order) == list(range(tasks))
    assert sorted(found.experts["a"]) == list(range(8))
    assert sorted(found.experts["b"]) == list(range(16))
    assert found == place(uses, weights.tolist(), ranks)


@given(st.permutations(range(5)), st.lists(st.floats(0.01, 1), min_size=5, max_size=5), st.integers(1, 8))
def test_homes_hold_equal_parts_in_order(order: list[int], weights: list[float], ranks: int) -> None:
    parts = np.array(weights) / sum(weights)
    shares = home_shares(order, parts, ranks)
    np.testing.assert_allclose(shares.sum(0), 1 / ranks, atol=1e-12)
    np.testing.assert_allclose(shares.sum(1), parts, atol=1e-12)
    first = [np.flatnonzero(shares[task] > 1e-12) for task in order]
    assert all(here[-1] <= after[0] for here, after in itertools.pairwise(first))


def test_separate_tasks_stay_at_home() -> None:
    rng = np.random.default_rng(3)
    group_of_task, uses = rng.permutation([0, 0, 1, 1, 2, 2, 3, 3]), {}
    for layer in ("a", "b", "c"):
        group_of_expert = rng.permutation(np.repeat(range(4), 3))
        uses[layer] = LayerUse(shares_TE=(group_of_task[:, None] == group_of_expert).astype(float), row_bytes=1.0)
    found = place(uses, [1.0] * 8, 4)
    assert expected_bytes(uses, found.experts, home_shares(found.task_order, np.full(8, 1 / 8), 4)) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_no_placement_of_a_small_case_is_better(seed: int) -> None:
    uses = {"a": random_use(2 * seed, 4, 4, 2), "b": random_use(2 * seed + 1, 4, 4, 2)}
    weights = np.full(4, 0.25)

    def best(order: tuple[int, ...]) -> float:
        homes = home_shares(order, weights, 2)
        return sum(
            min(expected_bytes({name: use}, {name: experts}, homes) for experts in itertools.permutations(range(4)))
            for name, use in uses.items()
        )

    least = min(best(order) for order in itertools.permutations(range(4)))
    found = place(uses, weights.tolist(), 2, load_limit=2.0)
    assert expected_bytes(uses, found.experts, home_shares(found.task_order, weights, 2)) == pytest.approx(least)


def test_load_stays_within_the_limit_where_experts_allow_it() -> None:
    """All tasks want the same two experts together, which would be one rank with everything to do."""
    shares = np.tile([1.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.1, 0.1], (4, 1))
    use = LayerUse(shares_TE=shares, row_bytes=1.0)
    weights = np.full(4, 0.25)
    held = place({"a": use}, weights.tolist(), 2).experts["a"]
    assert rank_loads(use, held, weights, 2).max() <= LOAD_LIMIT
    free = place({"a": use}, weights.tolist(), 2, load_limit=2.0).experts["a"]
    assert rank_loads(use, free, weights, 2).max() > LOAD_LIMIT
