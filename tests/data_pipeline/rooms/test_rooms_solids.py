"""Rays, surfaces and tiled tracing, against definitions and brute force."""

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.rooms.camera import Camera
from data_pipeline.rooms.primitives import MISS, intersect
from data_pipeline.rooms.scene import Frame, Kind, Material, Scene, Solids, Thing
from data_pipeline.rooms.surfaces import surface
from data_pipeline.rooms.tracing import first_hits, light_visibility
from tests.data_pipeline.rooms.distances import DISTANCE, Array

DIMS = {
    Kind.BOX: (0.4, 0.3, 0.2, 0.0),
    Kind.ROUNDED: (0.4, 0.3, 0.2, 0.08),
    Kind.ELLIPSOID: (0.4, 0.25, 0.15, 0.0),
    Kind.FRUSTUM: (0.3, 0.15, 0.25, 0.0),
    Kind.LIMB: (0.2, 0.1, 0.3, 0.0),
    Kind.RING: (0.3, 0.08, 0.0, 0.0),
}


def shoot(kind: Kind, count: int = 1500) -> tuple[Array, Array, Array, Array]:
    """Origins, directions, t and dims of random rays towards a solid, coordinates first."""
    rng = np.random.default_rng(int(kind))
    origin = rng.normal(size=(3, count))
    origin *= rng.uniform(1.0, 5.0, count) / np.linalg.norm(origin, axis=0)
    direction = (rng.uniform(-0.4, 0.4, (3, count)) - origin) * rng.uniform(0.3, 2, count)
    dims = np.array(DIMS[kind], np.float32)[:, None]
    t = intersect(kind, origin.astype(np.float32), direction.astype(np.float32), dims)
    return origin, direction, t.astype(float), dims


@pytest.mark.parametrize("kind", list(DIMS))
def test_hits_lie_on_the_surface_and_are_the_first(kind: Kind) -> None:
    origin, direction, t, _ = shoot(kind)
    distance, dims = DISTANCE[kind], np.array(DIMS[kind])
    hit = t < MISS
    assert 0.1 < hit.mean() < 1
    points = origin[:, hit] + t[hit] * direction[:, hit]
    assert np.abs(distance(points, dims)).max() < 3e-3
    for share in np.linspace(0.02, 0.98, 25):  # nothing solid before the hit
        before = origin[:, hit] + share * t[hit] * direction[:, hit]
        assert distance(before, dims).min() > -2e-3
    steps = np.linspace(0, 2.5, 60)
    for share in steps:  # nothing solid along a ray that misses
        along = origin[:, ~hit] + share * direction[:, ~hit]
        assert distance(along, dims).min() > -6e-3


@pytest.mark.parametrize("kind", list(DIMS))
def test_normals_are_gradients_of_distance(kind: Kind) -> None:
    origin, direction, t, dims = shoot(kind)
    hit = t < MISS
    points = origin[:, hit] + t[hit] * direction[:, hit]
    normal = surface(kind, points.astype(np.float32), np.broadcast_to(dims, (4, points.shape[1]))).normal
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-3
    assert (normal * direction[:, hit]).sum(0).max() < 1e-2 * np.linalg.norm(direction[:, hit], axis=0).max()
    gradient = np.stack(
        [
            DISTANCE[kind](points + step[:, None], np.array(DIMS[kind]))
            - DISTANCE[kind](points - step[:, None], np.array(DIMS[kind]))
            for step in np.eye(3) * 2e-3
        ]
    )
    gradient /= np.linalg.norm(gradient, axis=0)
    cosine = (gradient * normal).sum(0)
    assert np.quantile(cosine, 0.05) > 0.99  # edges of boxes and caps have no gradient


@pytest.mark.parametrize(
    ("kind", "dims", "point", "expected"),
    [
        (Kind.ELLIPSOID, (0.5, 0.5, 0.5), (0.5, 0, 0), (2, 2)),
        (Kind.ELLIPSOID, (0.4, 0.2, 0.1), (0.4, 0, 0), (40, 10)),  # a / b^2 and a / c^2
        (Kind.FRUSTUM, (0.25, 0.25, 0.5), (0.25, 0, 0), (4, 0)),
        (Kind.FRUSTUM, (0.25, 0.25, 0.5), (0.1, 0, 0.5), (0, 0)),
        (Kind.LIMB, (0.25, 0.25, 0.5), (0.25, 0, 0), (4, 0)),
        (Kind.LIMB, (0.25, 0.25, 0.5), (0, 0, 0.75), (4, 4)),
        (Kind.RING, (0.5, 0.1), (0.6, 0, 0), (10, 1 / 0.6)),
        (Kind.RING, (0.5, 0.1), (0.4, 0, 0), (10, -2.5)),
        (Kind.ROUNDED, (0.4, 0.3, 0.2, 0.1), (0.4, 0, 0), (0, 0)),
        (Kind.BOX, (0.4, 0.3, 0.2), (0.4, 0.1, 0), (0, 0)),
    ],
)
def test_curvature_of_known_points(
    kind: Kind, dims: tuple[float, ...], point: tuple[float, ...], expected: tuple[float, float]
) -> None:
    padded = np.array([*dims, 0, 0][:4], np.float32)[:, None]
    found = surface(kind, np.array(point, np.float32)[:, None], padded).curvature[:, 0]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def a_scene() -> Solids:
    paint = Material(texture="plain", ground=(0.5, 0.5, 0.5), figure=(0.4, 0.4, 0.4))
    scene = Scene(2.0, 2.0, 2.5, [paint] * 6)
    rng = np.random.default_rng(3)
    for _ in range(12):
        x, y = rng.uniform(-1.5, 1.5, 2)
        piece = Thing(scene, "carton", Frame(float(x), float(y), 0.2, float(rng.uniform(0, 6))))
        piece.box((0, 0, 0.2), (0.2, 0.15, 0.2), paint, turn=0.3)
        piece.rounded((0, 0, 0.6), (0.15, 0.15, 0.1), 0.05, paint)
        piece.ball((0.3, 0, 0.2), (0.1, 0.15, 0.2), paint)
        piece.cone((0, 0.3, 0.9), 0.2, 0.05, 0.1, paint, axis="x")
        piece.limb((0, 0, 0.7), (0.2, 0.3, 1.2), 0.03, 0.05, paint)
        piece.ring((0, 0, 1.3), 0.15, 0.04, paint, axis="y")
    return scene.freeze()


def brute_force(solids: Solids, origins: Array, directions: Array) -> tuple[Array, NDArray[np.int64]]:
    """Nearest t and solid over all solids but the room, for rays (N, 3)."""
    best, which = np.full(len(directions), float(MISS)), np.full(len(directions), -1)
    for p in np.flatnonzero(solids.kind != Kind.SHELL):
        origin = np.einsum("kx,nx->kn", solids.axes[p], (origins - solids.centre[p]).astype(np.float32))
        direction = np.einsum("kx,nx->kn", solids.axes[p], directions.astype(np.float32))
        t = intersect(Kind(solids.kind[p]), origin, direction, solids.dims[p][:, None])
        closer = t < best
        best[closer], which[closer] = t[closer], p
    return best, which


@pytest.mark.parametrize("eye", [(-1.8, -1.7, 1.5), (0.1, 0.0, 1.2)])
def test_tiles_see_what_brute_force_sees(eye: tuple[float, float, float]) -> None:
    solids = a_scene()
    camera = Camera.looking_at(eye, (0.5, 0.6, 0.6), 75)
    grid = camera.grid(37)
    depth, seen = first_hits(solids, grid)
    directions = grid.directions().reshape(-1, 3)
    t, which = brute_force(solids, np.broadcast_to(camera.position, directions.shape), directions)
    covered = t < depth.ravel() + 1e-3
    agrees = np.where(covered, which == seen.ravel(), seen.ravel() < 6)
    assert covered.mean() > 0.2
    assert agrees.mean() > 0.999
    assert np.abs(t - depth.ravel())[covered & agrees].max() < 2e-3


def test_the_empty_room_is_seen_from_inside() -> None:
    paint = Material(texture="plain", ground=(0.5, 0.5, 0.5), figure=(0.4, 0.4, 0.4))
    solids = Scene(2.0, 3.0, 2.5, [paint] * 6).freeze()
    camera = Camera.looking_at((0.0, 0.0, 1.25), (0.0, 1.0, 1.25), 60)
    depth, seen = first_hits(solids, camera.grid(16))
    assert seen[17, 8] == 3  # the wall at +y
    assert depth[17, 8] == pytest.approx(3.0, abs=1e-4)


def test_shadows_are_what_brute_force_sees() -> None:
    solids = a_scene()
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-1.9, 1.9, (21, 19, 2)), np.full((21, 19, 1), 0.01)], -1).astype(np.float32)
    light = np.array([0.2, -0.1, 2.3], np.float32)
    lights = (light + rng.normal(0, 0.05, (16, 3))).astype(np.float32)
    lit = np.ones((21, 19), bool)
    lit[:3] = False
    visible = light_visibility(solids, points, lit, lights)
    rows, columns = np.mgrid[:21, :19]
    sample = lights[(4 * (rows % 4) + columns % 4).ravel()]
    t, _ = brute_force(solids, sample, points.reshape(-1, 3) - sample)
    expected = (t >= 1).reshape(21, 19) & lit
    assert 0.2 < expected.mean() < 0.9
    assert (visible == expected).mean() > 0.995
