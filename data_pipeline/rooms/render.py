"""From a furnished room to an image and to the exact geometry behind every pixel.

Light: a ceiling lamp and daylight (or a second lamp), both of finite size and with soft shadows; a hemisphere of
ambient light, darkened where neighbouring surfaces close a point in; Lambert and Blinn-Phong reflection.

Shape legend: samples lie on a grid of 2 n + 1 rows and n + 1 columns (`camera.SampleGrid`), pixels on n x n.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.rooms.camera import Camera, SampleGrid
from data_pipeline.rooms.scene import TEXTURES, Bools, Floats, Ints, Kind, Point, Solids
from data_pipeline.rooms.scene_types import Room
from data_pipeline.rooms.surfaces import surface
from data_pipeline.rooms.textures import Spots, albedo
from data_pipeline.rooms.tracing import first_hits, light_visibility

_AMBIENT_UP = np.array([0.30, 0.31, 0.34], np.float32)
_AMBIENT_DOWN = np.array([0.22, 0.20, 0.18], np.float32)


@dataclass(frozen=True)
class View:
    """What the camera sees at the centre of each of n x n pixels.

    Attributes:
        rgb: (n, n, 3) uint8, sRGB.
        depth: (n, n) float32, metres along the camera's axis. distance: the same along the ray.
        normal: (n, n, 3) float32, unit, in camera axes x right, y down, z forward (so it looks back: mostly z < 0).
        curvature: (2, n, n) float32, principal curvatures k1 >= k2, 1/m.
        facing: (n, n) float32, cosine between the normal and the direction to the camera.
        object, cls, part: (n, n) int32. valid: (n, n) bool, False on window panes, behind which nothing is known.
        focal_pixels: focal length in pixels. scene_type: key of `catalogue.PLACES_INDEX`.
    """

    rgb: NDArray[np.uint8]
    depth: Floats
    distance: Floats
    normal: Floats
    curvature: Floats
    facing: Floats
    object: Ints
    cls: Ints
    part: Ints
    valid: Bools
    focal_pixels: float
    scene_type: str

    @property
    def size(self) -> int:
        """Pixels per side."""
        return len(self.depth)

    @cached_property
    def gray(self) -> Floats:
        """(n, n) float32 luma of the image in [0, 1] (ITU-R BT.601)."""
        luma: Floats = self.rgb.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return luma / np.float32(255)


@dataclass(frozen=True)
class _Samples:
    """Surface properties at all S samples, flattened."""

    point: Floats  # (S, 3)
    normal: Floats  # (S, 3) world
    curvature: Floats  # (2, S)
    albedo: Floats  # (S, 3)
    gloss: Floats  # (S,)
    glow: Floats  # (S,)


def render(room: Room, solids: Solids, camera: Camera, size: int, rng: np.random.Generator) -> View:
    """Render a room at size x size pixels; `rng` draws exposure, white balance and sensor noise."""
    grid = camera.grid(size)
    depth, seen = first_hits(solids, grid)
    directions = grid.directions()
    samples = _surfaces(solids, camera, depth, seen, directions, size, rng)
    radiance = _shade(room, solids, samples, seen, directions.reshape(-1, 3), depth, grid, rng)
    normal = _centres(samples.normal.reshape(*depth.shape, 3))
    ray = _centres(directions)
    length = np.linalg.norm(ray, axis=-1)
    index, axial = _centres(seen), _centres(depth)
    return View(
        rgb=_develop(radiance.reshape(*depth.shape, 3), rng),
        depth=axial,
        distance=axial * length,
        normal=np.stack([normal @ camera.right, -(normal @ camera.up), normal @ camera.forward], -1),
        curvature=np.stack([_centres(k.reshape(depth.shape)) for k in samples.curvature]),
        facing=np.clip(-(normal * ray).sum(-1) / length, 0, 1),
        object=solids.object[index],
        cls=solids.cls[index],
        part=solids.part[index],
        valid=~solids.glass[index],
        focal_pixels=camera.focal_pixels(size),
        scene_type=room.scene_type,
    )


def _centres(samples: np.ndarray) -> np.ndarray:
    """The pixel centres among the samples of a grid."""
    return samples[1::2, :-1]


def _surfaces(
    solids: Solids, camera: Camera, depth: Floats, seen: Ints, directions: Floats, size: int, rng: np.random.Generator
) -> _Samples:
    flat, index = depth.ravel(), seen.ravel()
    ray = directions.reshape(-1, 3)
    point = camera.position + ray * flat[:, None]
    normal = np.empty_like(point)
    curvature = np.zeros((2, len(flat)), np.float32)
    uv = np.empty((2, len(flat)), np.float32)
    kinds = solids.kind[index]
    for kind in Kind:
        pick = np.flatnonzero(kinds == kind)
        if len(pick) == 0:
            continue
        s = index[pick]
        axes = solids.axes[s]
        local = np.einsum("nkx,nx->kn", axes, point[pick] - solids.centre[s])
        found = surface(kind, local, solids.dims[s].T)
        normal[pick] = np.einsum("nkx,kn->nx", axes, found.normal)
        uv[:, pick], curvature[:, pick] = found.uv, found.curvature
    # At the silhouette of a marched solid the normal may lean over by rounding: make it graze the ray at most.
    squares = (ray * ray).sum(1)
    away = np.maximum((normal * ray).sum(1), 0) / squares
    normal -= away[:, None] * ray
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    # A sample is about half a pixel apart from the next; on a slanted surface it covers more.
    slant = np.maximum(-(normal * ray).sum(1) / np.sqrt(squares), 0.2)
    footprint = flat * (2 * camera.tangent / size * 0.8) / slant
    colour = _albedo(solids, solids.material[index], uv, footprint, rng)
    gloss = np.array([m.gloss for m in solids.materials], np.float32)[solids.material[index]]
    glow = np.array([m.glow for m in solids.materials], np.float32)[solids.material[index]]
    return _Samples(point, normal, curvature, colour, gloss, glow)


def _albedo(solids: Solids, material: Ints, uv: Floats, footprint: Floats, rng: np.random.Generator) -> Floats:
    """(S, 3) linear albedo of all samples."""
    table = solids.materials
    ground = np.array([m.ground for m in table], np.float32)
    figure = np.array([m.figure for m in table], np.float32)
    period = np.array([m.period for m in table], np.float32)
    seed = np.array([m.seed for m in table], np.float32)
    texture = np.array([TEXTURES.index(m.texture) for m in table])[material]
    noise = rng.random((64, 64), dtype=np.float32)
    colour = np.empty((len(material), 3), np.float32)
    for number, name in enumerate(TEXTURES):
        pick = np.flatnonzero(texture == number)
        if len(pick):
            m = material[pick]
            u, v = uv[:, pick]
            colour[pick] = albedo(name, Spots(u, v, ground[m], figure[m], period[m], seed[m], footprint[pick], noise))
    return colour


def _shade(
    room: Room,
    solids: Solids,
    samples: _Samples,
    seen: Ints,
    ray: Floats,
    depth: Floats,
    grid: SampleGrid,
    rng: np.random.Generator,
) -> Floats:
    """(S, 3) radiance towards the camera."""
    shape = seen.shape
    lifted = (samples.point + samples.normal * np.float32(4e-3)).reshape(*shape, 3)
    pixel_point, pixel_normal = _centres(lifted), _centres(samples.normal.reshape(*shape, 3))
    pixel_seen = _centres(seen)
    closed = _closure(pixel_point, pixel_normal, _centres(depth), grid.camera.focal_pixels(shape[1] - 1))
    openness = _to_samples(_smooth(1 - closed, pixel_seen), pixel_seen, seen).reshape(-1, 1)
    up = 0.5 + 0.5 * samples.normal[:, 2:]
    radiance = samples.albedo * (up * _AMBIENT_UP + (1 - up) * _AMBIENT_DOWN) * openness * 1.5
    radiance += samples.albedo * samples.glow[:, None] * 1.2
    view = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    for centre, radius, colour in _lights(room, rng):
        lit = ((centre - pixel_point) * pixel_normal).sum(-1) > 0
        seen_light = light_visibility(solids, pixel_point, lit, centre + radius * _BALL)
        visible = _to_samples(_smooth(seen_light, pixel_seen), pixel_seen, seen).ravel()
        towards = centre - samples.point
        square = (towards * towards).sum(1)
        towards /= np.sqrt(square)[:, None]
        lambert = np.maximum((samples.normal * towards).sum(1), 0) * visible
        half_way = towards - view
        half_way /= np.linalg.norm(half_way, axis=1, keepdims=True)
        shine = np.maximum((samples.normal * half_way).sum(1), 0) ** 40 * samples.gloss * visible * (lambert > 0)
        radiance += (samples.albedo * lambert[:, None] + shine[:, None]) * (colour / (0.6 + square)[:, None])
    return radiance * np.sqrt(openness)


def _lights(room: Room, rng: np.random.Generator) -> list[tuple[Floats, float, Floats]]:
    """Centre, radius and colour of each light."""
    warm = np.array([1.0, rng.uniform(0.86, 0.97), rng.uniform(0.7, 0.92)], np.float32)
    lights = [(_point(room.lamp), 0.16, warm * np.float32(rng.uniform(2.5, 5.0)))]
    if room.daylight:
        cool = np.array([0.88, 0.95, 1.0], np.float32)
        lights.append((_point(room.daylight), 0.3, cool * np.float32(rng.uniform(1.5, 4.0))))
    return lights


def _point(position: Point) -> Floats:
    return np.array(position, np.float32)


def _light_samples() -> Floats:
    """(16, 3) points of a unit ball, spread by golden angles, in an order in which near numbers lie apart."""
    k = np.arange(16)
    z = 1 - (2 * k + 1) / 16
    angle = k * np.pi * (3 - np.sqrt(5))
    flat = np.sqrt(1 - z * z)
    points = np.stack([flat * np.cos(angle), flat * np.sin(angle), z], 1) * 0.8
    return points[(k * 7) % 16].astype(np.float32)


_BALL = _light_samples()


def _smooth(values: Floats, index: Ints) -> Floats:
    """Mean over the 4 x 4 window of each pixel, of pixels on the same solid only."""
    n = len(values)
    padded = np.pad(values, 2)
    labels = np.pad(index, 2, constant_values=-1)
    total, weight = np.zeros_like(values), np.zeros_like(values)
    for i in range(4):
        for j in range(4):
            same = labels[i : i + n, j : j + n] == index
            total += same * padded[i : i + n, j : j + n]
            weight += same
    return total / weight


def _to_samples(pixels: Floats, pixel_index: Ints, index: Ints) -> Floats:
    """Spread pixel values to all samples: corners take the mean of the neighbouring pixels on the same solid, or of
    all four where none is."""
    n = len(pixels)
    out = np.empty(index.shape, np.float32)
    out[1::2, :-1] = pixels
    out[1::2, -1] = pixels[:, -1]
    values = np.pad(pixels, 1, mode="edge")
    labels = np.pad(pixel_index, 1, mode="edge")
    corner = index[::2]
    total, weight, plain = (np.zeros(corner.shape, np.float32) for _ in range(3))
    for i in (0, 1):
        for j in (0, 1):
            value = values[i : i + n + 1, j : j + n + 1]
            same = labels[i : i + n + 1, j : j + n + 1] == corner
            total += same * value
            weight += same
            plain += 0.25 * value
    out[::2] = np.where(weight > 0, total / np.maximum(weight, 1), plain)
    return out


def _closure(point: Floats, normal: Floats, depth: Floats, focal: float) -> Floats:
    """(n, n) share of the hemisphere that nearby surfaces close, estimated from neighbours on the screen.

    A screen-space form of ambient occlusion (Mittring, "Finding next gen: CryEngine 2", 2007): neighbours at two
    radii count as far as they rise above the tangent plane and lie near.
    """
    n = len(depth)
    typical = focal * 0.2 / float(np.median(depth))  # pixels that span 20 cm
    closed = np.zeros((n, n), np.float32)
    for radius in (typical * 0.35, typical):
        for k in range(6):
            angle = np.pi * (k + 0.5 * (radius == typical)) / 3
            dy, dx = round(radius * np.sin(angle)), round(radius * np.cos(angle))
            away = _moved(point, dy, dx) - point
            square = (away * away).sum(-1) + 1e-6
            rise = (away * normal).sum(-1) / np.sqrt(square)
            closed += np.clip(rise - 0.08, 0, 1) / (1 + square * 12)
    share: Floats = np.clip(closed * (1.4 / 12), 0, 0.8)
    return share


def _moved(image: Floats, dy: int, dx: int) -> Floats:
    """image[i + dy, j + dx], clamped to the image."""
    n = len(image)
    rows = np.clip(np.arange(n) + dy, 0, n - 1)
    columns = np.clip(np.arange(n) + dx, 0, n - 1)
    return image[rows][:, columns]


def _develop(radiance: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Anti-aliased, exposed and gamma-encoded image with vignetting and noise."""
    corners = radiance[::2]
    image = 0.5 * _centres(radiance) + 0.125 * (
        corners[:-1, :-1] + corners[1:, :-1] + corners[:-1, 1:] + corners[1:, 1:]
    )
    n = len(image)
    image *= np.float32(0.6 * rng.uniform(0.8, 1.25) / np.quantile(image, 0.9))
    image *= np.array([rng.uniform(0.94, 1.06), 1.0, rng.uniform(0.92, 1.08)], np.float32)
    image = image / (1 + 0.3 * image) * 1.25  # soft shoulder
    line = np.linspace(-1, 1, n, dtype=np.float32)
    image *= (1 - 0.1 * (line[:, None] ** 2 + line[None] ** 2))[..., None]
    image = np.clip(image, 0, 1) ** np.float32(1 / 2.2)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.003, 0.012))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
