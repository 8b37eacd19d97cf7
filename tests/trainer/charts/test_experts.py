from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.trainer.pictures import ink
from trainer.charts.affinity import affinity_of
from trainer.charts.experts import (
    ConflictCurve,
    ConflictMap,
    ExpertMap,
    affinity_chart,
    conflict_curve_chart,
    conflict_map_chart,
    expert_map_chart,
    expert_order,
)

TASKS = ["a", "b", "c"]


def test_the_expert_map_shows_the_share_of_every_cell(tmp_path: Path) -> None:
    share = np.zeros((3, 4))
    path = tmp_path / "map.png"
    expert_map_chart(path, TASKS, [0, 1, 2], [ExpertMap(layer="mlp", share_TE=share, mutual_information=0.0)])
    cold = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    expert_map_chart(path, TASKS, [0, 1, 2], [ExpertMap(layer="mlp", share_TE=share + 1, mutual_information=0.0)])
    hot = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    assert (np.abs(hot - cold).sum(-1) > 100).mean() > 0.3


def test_the_expert_map_takes_a_task_without_tokens(tmp_path: Path) -> None:
    share = np.array([[1.0, 0.0], [np.nan, np.nan], [0.0, 1.0]])
    maps = [ExpertMap(layer=f"layer{i}", share_TE=share, mutual_information=0.0) for i in range(5)]
    expert_map_chart(tmp_path / "map.png", TASKS, [2, 0, 1], maps)
    assert ink(tmp_path / "map.png") > 10_000


def test_expert_order_makes_a_permutation_diagonal_and_puts_unused_experts_last() -> None:
    share = np.zeros((3, 5))
    share[0, 4] = share[1, 1] = share[2, 3] = 1.0
    assert expert_order(share) == [4, 1, 3, 0, 2]


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 8), experts=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_expert_order_is_a_permutation(tasks: int, experts: int, seed: int) -> None:
    share = np.random.default_rng(seed).random((tasks, experts))
    share[share < 0.3] = 0.0
    share[share > 0.9] = np.nan
    assert sorted(expert_order(share)) == list(range(experts))


@pytest.mark.parametrize("tasks", [2, 13])
def test_affinity_of_few_and_many_tasks_is_drawn(tmp_path: Path, tasks: int) -> None:
    share = np.random.default_rng(0).dirichlet(np.ones(4), size=tasks)
    affinity_chart(tmp_path / "affinity.png", affinity_of([f"task{i}" for i in range(tasks)], [share]))
    assert ink(tmp_path / "affinity.png") > 1_000


def test_affinity_with_a_task_without_tokens_is_drawn(tmp_path: Path) -> None:
    share = np.array([[1.0, 0.0], [np.nan, np.nan], [0.5, 0.5]])
    affinity_chart(tmp_path / "affinity.png", affinity_of(TASKS, [share]))
    assert ink(tmp_path / "affinity.png") > 10_000


def colours(path: Path) -> tuple[int, int]:
    """Number of clearly blue and of clearly orange pixels, on white."""
    with Image.open(path) as image:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        red, _, blue = np.moveaxis(np.asarray(page.convert("RGB"), dtype=np.int64), -1, 0)
    return int((blue > red + 80).sum()), int((red > blue + 80).sum())


def test_conflict_is_orange_and_agreement_blue(tmp_path: Path) -> None:
    path = tmp_path / "conflict.png"
    conflict_map_chart(path, TASKS, [0, 1, 2], [[ConflictMap(title="experts", cosine_TT=np.full((3, 3), 0.3))]])
    blue, orange = colours(path)
    assert blue > 20 * max(orange, 1000)  # orange: the colour bar alone
    conflict_map_chart(path, TASKS, [0, 1, 2], [[ConflictMap(title="experts", cosine_TT=np.full((3, 3), -0.3))]])
    assert colours(path)[1] > 20 * max(colours(path)[0], 1000)


def test_conflict_maps_with_gaps_and_unknown_cosines_are_drawn(tmp_path: Path) -> None:
    unknown = ConflictMap(title="experts", cosine_TT=np.full((3, 3), np.nan))
    known = ConflictMap(title="shared", cosine_TT=np.full((3, 3), 0.5))
    conflict_map_chart(tmp_path / "maps.png", TASKS, [0, 2, 1], [[None, unknown], [known, known]])
    assert ink(tmp_path / "maps.png") > 10_000


def test_conflict_curves_are_drawn(tmp_path: Path) -> None:
    values = np.array([0.1, np.nan, -0.1])
    item = ConflictCurve(
        kind="experts",
        part="mlp",
        name="experts, MLP",
        block=np.arange(3.0),
        mean=values,
        share=values,
        strength=values,
    )
    conflict_curve_chart(tmp_path / "curves.png", [item], trunk=1)
    assert colours(tmp_path / "curves.png")[1] > 100
