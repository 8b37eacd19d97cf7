from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.charts import (
    ExpertMap,
    Progress,
    expert_map_chart,
    expert_order,
    progress_chart,
    task_loss_chart,
    task_order,
)


def ink(path: Path) -> int:
    """Number of pixels that something was drawn on."""
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        return int((np.asarray(image)[..., 3] > 0).sum())


@pytest.mark.parametrize("logged", [1, 5, 200])
def test_curves_of_any_length_are_drawn(tmp_path: Path, logged: int) -> None:
    steps = np.arange(logged, dtype=np.float64)
    falling = 1 / (1 + steps)
    progress_chart(
        tmp_path / "progress.png",
        Progress(
            steps=steps,
            loss=falling,
            mutual_information={"block0.attention": steps, "block1.mlp": steps / 2},
            learning_rate=falling,
            images_per_second=steps,
        ),
    )
    task_loss_chart(tmp_path / "tasks.png", steps, {f"task{i}": falling for i in range(7)})
    assert ink(tmp_path / "progress.png") > 10_000
    assert ink(tmp_path / "tasks.png") > 10_000


def test_a_gap_of_non_finite_losses_does_not_hide_the_rest(tmp_path: Path) -> None:
    steps = np.arange(100, dtype=np.float64)
    loss = np.where((steps > 40) & (steps < 60), np.nan, 1.0)
    task_loss_chart(tmp_path / "gap.png", steps, {"depth": loss})
    task_loss_chart(tmp_path / "empty.png", steps, {"depth": np.full(100, np.nan)})
    assert ink(tmp_path / "gap.png") > ink(tmp_path / "empty.png")


def test_the_expert_map_shows_the_share_of_every_cell(tmp_path: Path) -> None:
    share = np.zeros((3, 4))
    path = tmp_path / "map.png"
    expert_map_chart(path, ["a", "b", "c"], [ExpertMap(layer="mlp", share_TE=share, mutual_information=0.0)])
    cold = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    expert_map_chart(path, ["a", "b", "c"], [ExpertMap(layer="mlp", share_TE=share + 1, mutual_information=0.0)])
    hot = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    assert (np.abs(hot - cold).sum(-1) > 100).mean() > 0.3


def test_the_expert_map_takes_a_task_without_tokens(tmp_path: Path) -> None:
    share = np.array([[1.0, 0.0], [np.nan, np.nan], [0.0, 1.0]])
    maps = [ExpertMap(layer=f"layer{i}", share_TE=share, mutual_information=0.0) for i in range(5)]
    expert_map_chart(tmp_path / "map.png", ["a", "b", "c"], maps)
    assert ink(tmp_path / "map.png") > 10_000


def test_task_order_puts_users_of_the_same_experts_side_by_side() -> None:
    first, second = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 1.0])
    share = np.stack([first, second, first * 0.9, second * 0.9])
    order = task_order([share, share])
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_expert_order_makes_a_permutation_diagonal_and_puts_unused_experts_last() -> None:
    share = np.zeros((3, 5))
    share[0, 4] = share[1, 1] = share[2, 3] = 1.0
    assert expert_order(share) == [4, 1, 3, 0, 2]


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 8), experts=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_orders_are_permutations(tasks: int, experts: int, seed: int) -> None:
    share = np.random.default_rng(seed).random((tasks, experts))
    share[share < 0.3] = 0.0
    share[share > 0.9] = np.nan
    assert sorted(task_order([share])) == list(range(tasks))
    assert sorted(expert_order(share)) == list(range(experts))
