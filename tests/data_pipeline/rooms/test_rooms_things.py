"""Things fill the space that is claimed for them and no more, so that none stands in another or in the camera."""

from random import Random

import numpy as np
import pytest

from data_pipeline.rooms import appliances, people, smalls
from data_pipeline.rooms.catalogue import OBJECT_CLASSES
from data_pipeline.rooms.kit import Kit, Top
from data_pipeline.rooms.palette import Palette
from data_pipeline.rooms.scene import Frame, Kind, Material, Scene, Solids
from data_pipeline.rooms.scene_types import furnish
from data_pipeline.rooms.viewpoint import choose_camera
from tests.data_pipeline.rooms.distances import DISTANCE, Array

# Pairs that touch by design: soft things yield, and a window is a frame around its panes.
TOUCHING = {
    frozenset(pair)
    for pair in (
        ("pillow", "bed"), ("pillow", "sofa"), ("pillow", "armchair"), ("pillow",), ("pillow", "person"),
        ("person", "sofa"), ("person", "armchair"), ("bowl", "fruit"), ("bird", "blocks"), ("sink", "cabinet"),
        ("window",), ("door", "wall"),
    )
}  # fmt: skip


def an_empty_kit(seed: int) -> Kit:
    paint = Material(texture="plain", ground=(0.5, 0.5, 0.5), figure=(0.4, 0.4, 0.4))
    rng = Random(seed)
    return Kit(Scene(3, 3, 2.5, [paint] * 6), rng, Palette(rng))


def points_inside(solids: Solids, p: int, rng: np.random.Generator, count: int) -> Array:
    """World positions (N, 3) of random points inside a solid."""
    local = rng.uniform(-1, 1, (count, 3)) * solids.extent[p]
    local = local[DISTANCE[Kind(solids.kind[p])](local.T, solids.dims[p].astype(float)) < 0]
    points: Array = local @ solids.axes[p] + solids.centre[p]
    return points


def depth_in(solids: Solids, p: int, points: Array) -> float:
    """How deep the deepest of the world's points (N, 3) lies in a solid; negative if all are outside."""
    local = (points - solids.centre[p]) @ solids.axes[p].T
    return float(-DISTANCE[Kind(solids.kind[p])](local.T, solids.dims[p].astype(float)).min())


def reaches(solids: Solids) -> Array:
    """(P, 3) half sizes of the solids' bounding boxes along the world's axes."""
    reach: Array = np.abs(solids.extent[:, :, None] * solids.axes).sum(1)
    return reach


@pytest.mark.parametrize("index", range(12))
def test_no_thing_stands_in_another(index: int) -> None:
    solids = furnish(Random(f"things/{index}")).scene.freeze()
    rng = np.random.default_rng(index)
    low, high = solids.centre - reaches(solids), solids.centre + reaches(solids)
    things = np.flatnonzero(solids.kind != Kind.SHELL)
    names = [OBJECT_CLASSES[cls].name for cls in solids.cls]
    for p in things:
        near = (low[p] < high[things]).all(1) & (low[things] < high[p]).all(1)
        others = [
            q
            for q in things[near & (solids.object[things] != solids.object[p])]
            if frozenset((names[p], names[q])) not in TOUCHING
        ]
        points = points_inside(solids, p, rng, 60) if others else np.empty((0, 3))
        for q in others if len(points) else ():
            assert depth_in(solids, q, points) < 0.01, f"{names[p]} stands in {names[q]}"


ITEMS = {
    item.make.__name__: item
    for item in (
        *smalls.HOUSEHOLD, *smalls.KITCHEN, *smalls.DESK, *smalls.TOYS, *smalls.PETS,
        smalls.Item(appliances.paper_bin, 0.16, 0.16, 0.38), smalls.Item(appliances.barrel, 0.28, 0.28, 0.82),
    )
}  # fmt: skip


def size_of(solids: Solids, rng: np.random.Generator) -> tuple[float, float, float]:
    """Half sizes about the origin, and height, of all things in a scene."""
    points = np.concatenate([points_inside(solids, p, rng, 300) for p in np.flatnonzero(solids.kind != Kind.SHELL)])
    half_x, half_y = np.abs(points[:, :2]).max(0)
    return float(half_x), float(half_y), float(points[:, 2].max())


@pytest.mark.parametrize("name", ITEMS)
def test_small_things_fit_the_box_they_declare(name: str) -> None:
    item = ITEMS[name]
    sizes = []
    for seed in range(4):
        kit = an_empty_kit(seed)
        item.make(kit, Frame(0, 0))
        sizes.append(size_of(kit.scene.freeze(), np.random.default_rng(seed)))
    largest = np.max(sizes, axis=0)
    declared = np.array((item.half_x, item.half_y, item.height))
    assert (largest <= declared).all(), f"{largest} declared as {declared}"
    assert (largest >= 0.55 * declared).all(), f"{largest} declared as {declared}"


@pytest.mark.parametrize("pose", people.HALF_SIZES)
def test_people_fit_the_floor_they_claim(pose: people.Pose) -> None:
    for seed in range(6):
        kit = an_empty_kit(seed)
        people.person(kit, Frame(0, 0), pose)
        half_x, half_y, height = size_of(kit.scene.freeze(), np.random.default_rng(seed))
        assert half_x <= people.HALF_SIZES[pose][0]
        assert half_y <= people.HALF_SIZES[pose][1]
        assert 1.6 < height < 1.85


@pytest.mark.parametrize("menu", [smalls.HOUSEHOLD, smalls.DESK, smalls.TOYS], ids=["household", "desk", "toys"])
def test_things_on_a_top_stay_on_it(menu: tuple[smalls.Item, ...]) -> None:
    placed = 0
    for seed in range(12):
        kit = an_empty_kit(seed)
        top = Top(Frame(0, 0, 0), 0.5, 0.11, 0.33)
        smalls.fill_top(kit, top, menu, 1.0)
        solids = kit.scene.freeze()
        if len(solids.kind) > 6:
            half_x, half_y, height = size_of(solids, np.random.default_rng(seed))
            assert half_x <= top.half_x + 1e-6
            assert half_y <= top.half_y + 1e-6
            assert height <= top.clearance + 1e-6
            placed += 1
    assert placed >= 6


def test_the_camera_is_clear_of_things() -> None:
    for index in range(12):
        rng = Random(f"things/{index}")
        room = furnish(rng)
        solids = room.scene.freeze()
        eye = choose_camera(room, solids, rng).position[None]
        things = np.flatnonzero(solids.kind != Kind.SHELL)
        assert max(depth_in(solids, p, eye) for p in things) < 0
        beyond = np.abs(np.einsum("pkx,px->pk", solids.axes[things], eye - solids.centre[things]))
        assert np.linalg.norm(np.maximum(beyond - solids.extent[things], 0), axis=1).min() > 0.44


def test_what_lies_flat_has_no_sides_to_see() -> None:
    """At 64 pixels a ledge of centimetres is a row of stray normals."""
    seen = set()
    for index in range(12):
        solids = furnish(Random(f"things/{index}")).scene.freeze()
        room = solids.half * np.array([[-1], [1]]) + (0, 0, solids.half[2])
        for p in np.flatnonzero(np.isin(solids.kind, (Kind.BOX, Kind.FRUSTUM))):
            name = OBJECT_CLASSES[solids.cls[p]].name
            if name in ("wall", "door", "picture", "rug"):
                inwards = np.abs(room - solids.centre[p]).min(0) + reaches(solids)[p]
                assert inwards.min() < 0.01, name
                seen.add(name)
    assert seen == {"wall", "door", "picture", "rug"}
