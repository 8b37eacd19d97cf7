"""Furniture does not overlap, whatever the seed, and no thing stands in another."""

import itertools
import math
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.rooms.layout import FloorPlan, Footprint, overlaps
from data_pipeline.rooms.scene import Frame
from data_pipeline.rooms.scene_types import furnish

coordinate = st.floats(-2, 2)
footprints = st.builds(
    Footprint,
    x=coordinate,
    y=coordinate,
    half_x=st.floats(0.1, 1),
    half_y=st.floats(0.1, 1),
    yaw=st.floats(-math.pi, math.pi),
    height=st.just(1.0),
)


def contains(footprint: Footprint, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cos, sin = math.cos(footprint.yaw), math.sin(footprint.yaw)
    dx, dy = x - footprint.x, y - footprint.y
    return (np.abs(dx * cos + dy * sin) < footprint.half_x) & (np.abs(dy * cos - dx * sin) < footprint.half_y)


@given(first=footprints, second=footprints)
def test_overlap_is_symmetric_and_finds_every_common_point(first: Footprint, second: Footprint) -> None:
    assert overlaps(first, second) == overlaps(second, first)
    grid = np.linspace(-1, 1, 41)
    u, v = np.meshgrid(grid * first.half_x, grid * first.half_y)
    cos, sin = math.cos(first.yaw), math.sin(first.yaw)
    common = contains(second, first.x + u * cos - v * sin, first.y + u * sin + v * cos)
    if common.sum() > 2:
        assert overlaps(first, second)
    if not overlaps(first, second):
        assert not overlaps(first, second, 0.0)
        assert common.sum() <= 2


@given(footprint=footprints)
def test_a_gap_counts_as_overlap(footprint: Footprint) -> None:
    away = Footprint(footprint.x + 10, footprint.y, 0.1, 0.1, 0.0, 1.0)
    assert not overlaps(footprint, away, 0.5)
    assert overlaps(footprint, footprint)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_furniture_stands_in_the_room_and_apart(seed: int) -> None:
    plan = furnish(Random(seed)).plan
    for first, second in itertools.combinations(plan.footprints, 2):
        assert not overlaps(first, second)
    for footprint in plan.footprints:
        for x, y in footprint.corners():
            assert abs(x) <= plan.half_width + 1e-6
            assert abs(y) <= plan.half_depth + 1e-6


def test_a_full_room_takes_nothing_more() -> None:
    plan = FloorPlan(1.0, 1.0, 2.5, Random(0))
    assert plan.place(Frame(0, 0), 0.9, 0.9, 1.0) is not None
    assert plan.anywhere(0.3, 0.3, 1.0) is None
    assert plan.against_wall(0.3, 0.2, 1.0) is None
    assert plan.place(Frame(0, 0), 0.1, 0.1, 1.0) is None


def test_tall_furniture_keeps_off_windows_but_low_furniture_may_stand_below() -> None:
    plan = FloorPlan(1.0, 1.0, 2.5, Random(0))
    for wall in range(4):
        assert plan.on_wall(0.85, 0.9, 1.8, depth=0.1, wall=wall, margin=0.0) is not None
    assert plan.against_wall(0.4, 0.2, 1.9) is None
    assert plan.against_wall(0.4, 0.2, 0.7) is not None


def test_backs_are_to_the_wall() -> None:
    plan = FloorPlan(2.0, 3.0, 2.5, Random(1))
    frame = plan.against_wall(0.4, 0.2, 1.0)
    assert frame is not None
    x, y, _ = frame.point((0, 0.22, 0))
    assert abs(x) > 1.99 or abs(y) > 2.99


def test_reserved_floor_stays_free() -> None:
    plan = FloorPlan(2.0, 2.0, 2.5, Random(0))
    assert plan.reserve(Frame(0, 0), 1.0, 1.0, 0.5)
    assert plan.place(Frame(0.5, 0.5), 0.2, 0.2, 1.0) is None
    assert plan.place(Frame(1.5, 1.5), 0.2, 0.2, 1.0) is not None
    assert not plan.reserve(Frame(1.5, 1.5), 0.5, 0.5, 0.5), "something stands there"
    assert len(plan.footprints) == 1


def test_what_hangs_on_a_wall_keeps_tall_things_away_and_lets_low_ones_stand_below() -> None:
    plan = FloorPlan(1.0, 1.0, 2.5, Random(0))
    shelf = plan.on_wall(0.8, 1.4, 2.0, depth=0.35, wall=3)
    assert shelf is not None
    x, y, z = shelf.point((0, 0, 0))
    assert (y, z) == (1.0, 1.7)
    assert plan.place(Frame(x, 0.8), 0.1, 0.1, 1.75) is None
    assert plan.place(Frame(x, 0.8), 0.1, 0.1, 0.9) is not None
    assert plan.on_wall(0.85, 0.5, 0.8, depth=0.4, wall=3) is None, "a thing stands before it"
