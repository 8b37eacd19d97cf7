"""Task-affine placement: valid for any use, best where the best is known, never at the price of overload."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.placement import LOAD_LIMIT, Floats, LayerPlaces, LayerUse, expected_bytes, home_shares, place, rank_loads


def random_use(seed: int, tasks: int, experts: int, top_k: int) -> LayerUse:
    """Tasks that use `top_k` experts nearly always."""
    rng = np.random.default_rng(seed)
    shares = np.full((tasks, experts), 0.0)
    for row in shares:
        row[rng.choice(experts, top_k, replace=False)] = 1.0
    return LayerUse(shares_TE=shares, row_bytes=8.0, choice_bytes=float(seed % 2))


def bytes_by_definition(uses: dict[str, LayerUse], placed: dict[str, LayerPlaces], home_TR: Floats) -> float:
    """By the definition, for shares of 0 and 1: every task's token visits the ranks of its experts."""
    ranks, total = home_TR.shape[1], 0.0
    for name, use in uses.items():
        holds = np.reshape(placed[name].order, (ranks, -1))
        shares_TE = use.shares_TE * ~np.isin(np.arange(use.shares_TE.shape[1]), placed[name].shadowed)
        total += use.shadow_bytes * len(placed[name].shadowed)
        for task, home in itertools.product(range(len(home_TR)), range(ranks)):
            away = [shares_TE[task, holds[rank]].sum() for rank in range(ranks) if rank != home]
            visits = sum(choices > 0 for choices in away)
            total += home_TR[task, home] * (visits * use.row_bytes + sum(away) * use.choice_bytes)
    return total


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(0, 2))
def test_any_use_is_placed(seed: int, tasks: int, ranks: int, top_k: int, most_shadowed: int) -> None:
    uses = {"a": random_use(seed, tasks, 8, top_k), "b": random_use(seed + 1, tasks, 16, 1)}
    weights = np.random.default_rng(seed).random(tasks) + 0.1
    found = place(uses, weights.tolist(), ranks, most_shadowed=most_shadowed)
    assert sorted(found.task_order) == list(range(tasks))
    for name, experts in (("a", 8), ("b", 16)):
        assert sorted(found.layers[name].order) == list(range(experts))
        assert len(found.layers[name].shadowed) <= most_shadowed
        assert set(found.layers[name].shadowed) <= set(range(experts))
    assert found == place(uses, weights.tolist(), ranks, most_shadowed=most_shadowed)
    homes = home_shares(found.task_order, weights / weights.sum(), ranks)
    expected = bytes_by_definition(uses, found.layers, homes)
    assert expected_bytes(uses, found, weights.tolist(), ranks) == pytest.approx(expected, abs=1e-3)


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
    assert bytes_by_definition(
        uses, found.layers, home_shares(found.task_order, np.full(8, 1 / 8), 4)
    ) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_no_placement_of_a_small_case_is_better(seed: int) -> None:
    uses = {"a": random_use(2 * seed, 4, 4, 2), "b": random_use(2 * seed + 1, 4, 4, 2)}
    weights = np.full(4, 0.25)

    def best(order: tuple[int, ...]) -> float:
        homes = home_shares(order, weights, 2)
        return sum(
            min(
                bytes_by_definition({name: use}, {name: LayerPlaces(order=experts)}, homes)
                for experts in itertools.permutations(range(4))
            )
            for name, use in uses.items()
        )

    least = min(best(order) for order in itertools.permutations(range(4)))
    found = place(uses, weights.tolist(), 2, load_limit=2.0)
    assert bytes_by_definition(uses, found.layers, home_shares(found.task_order, weights, 2)) == pytest.approx(least)


def test_load_stays_within_the_limit_where_experts_allow_it() -> None:
    """All tasks want the same two experts together, which would be one rank with everything to do."""
    shares = np.tile([1.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.1, 0.1], (4, 1))
    use = LayerUse(shares_TE=shares, row_bytes=1.0)
    weights = np.full(4, 0.25)
    homes = home_shares(range(4), weights, 2)
    held = place({"a": use}, weights.tolist(), 2).layers["a"]
    assert rank_loads(use, held, homes).max() <= LOAD_LIMIT
    free = place({"a": use}, weights.tolist(), 2, load_limit=2.0).layers["a"]
    assert rank_loads(use, free, homes).max() > LOAD_LIMIT


def test_an_expert_too_busy_for_any_rank_is_shadowed() -> None:
    """Every task chooses expert 0, and one of its own."""
    shares = np.hstack([np.ones((4, 1)), np.eye(4), np.zeros((4, 3))])
    use = LayerUse(shares_TE=shares, row_bytes=1.0, shadow_bytes=0.1)
    found = place({"a": use}, [1.0] * 4, 4, most_shadowed=3)
    places, homes = found.layers["a"], home_shares(found.task_order, np.full(4, 0.25), 4)
    assert places.shadowed == (0,)
    assert rank_loads(use, places, homes) == pytest.approx([1.0] * 4)
    assert bytes_by_definition({"a": use}, found.layers, homes) == pytest.approx(0.1), "the other experts lie at home"
    alone = place({"a": use}, [1.0] * 4, 4).layers["a"]
    assert rank_loads(use, alone, homes).max() >= 2.0


@pytest.mark.parametrize(("shadow_bytes", "shadowed"), [(0.74, 1), (0.76, 0)])
def test_weights_travel_only_where_they_are_fewer_bytes(shadow_bytes: float, shadowed: int) -> None:
    """One expert that every token of four ranks chooses: three quarters of the rows would leave home."""
    shares = np.hstack([np.ones((4, 1)), np.zeros((4, 3))])
    use = LayerUse(shares_TE=shares, row_bytes=1.0, shadow_bytes=shadow_bytes)
    found = place({"a": use}, [1.0] * 4, 4, most_shadowed=2, load_limit=4.0)
    assert len(found.layers["a"].shadowed) == shadowed
