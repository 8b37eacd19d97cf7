"""The surface of a solid at a point: unit normal, texture coordinates (metres), principal curvatures (1/m).

Curvatures are analytic, k1 >= k2, positive where the surface bulges towards its outside (do Carmo, "Differential
Geometry of Curves and Surfaces", ch. 3). All arrays are in the solid's frame: points (3, N), dims (4, N).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.rooms.scene import Floats, Kind


class Surface(NamedTuple):
    """Properties at N points: `normal` (3, N), `uv` (2, N), `curvature` (2, N); float32."""

    normal: Floats
    uv: Floats
    curvature: Floats


def surface(kind: Kind, points: Floats, dims: Floats) -> Surface:
    """Surface properties of solids of one kind at points that lie on them."""
    return _SURFACES[kind](points, dims)


def _on_face(points: Floats, axis: np.ndarray, side: Floats) -> Surface:
    """A flat face across `axis` (N,) whose outward normal has sign `side` (N,)."""
    normal = np.zeros_like(points)
    np.put_along_axis(normal, axis[None], side[None], axis=0)
    x, y, z = points
    uv = np.stack([np.where(axis == 0, y, x), np.where(axis == 2, y, z)])
    return Surface(normal, uv, np.zeros_like(uv))


def _shell(points: Floats, dims: Floats) -> Surface:
    return _on_face(points, dims[0].astype(np.int64), -dims[1])


def _box(points: Floats, dims: Floats) -> Surface:
    axis = (np.abs(points) - dims[:3]).argmax(0)
    return _on_face(points, axis, np.sign(np.take_along_axis(points, axis[None], axis=0)[0]))


def _rounded(points: Floats, dims: Floats) -> Surface:
    radius = dims[3]
    beyond = np.maximum(np.abs(points) - (dims[:3] - radius), 0)
    normal = np.sign(points) * beyond / np.maximum(np.sqrt((beyond * beyond).sum(0)), 1e-9)
    bent = (beyond > 1e-4).sum(0)
    curvature = np.stack([bent > 1, bent > 2]) / radius
    axis = np.abs(normal).argmax(0)
    x, y, z = points
    uv = np.stack([np.where(axis == 0, y, x), np.where(axis == 2, y, z)])
    return Surface(normal, uv, curvature.astype(np.float32))


def _ellipsoid(points: Floats, dims: Floats) -> Surface:
    radii = dims[:3]
    hessian = 1 / radii**2
    gradient = points * hessian
    steep = np.sqrt((gradient * gradient).sum(0))
    normal = gradient / steep
    # The shape operator is the Hessian of the implicit function on the tangent plane, over the gradient's length.
    double_mean = (hessian.sum(0) - (normal * normal * hessian).sum(0)) / steep
    cofactors = np.stack([hessian[1] * hessian[2], hessian[0] * hessian[2], hessian[0] * hessian[1]])
    gauss = (normal * normal * cofactors).sum(0) / steep**2
    spread = np.sqrt(np.maximum(double_mean**2 / 4 - gauss, 0))
    height = np.clip(points[2] / radii[2], -1, 1)
    uv = np.stack([np.arctan2(points[1], points[0]) * radii[0], np.arcsin(height) * radii[2]])
    return Surface(normal, uv, np.stack([double_mean / 2 + spread, double_mean / 2 - spread]))


def _frustum(points: Floats, dims: Floats) -> Surface:
    bottom, top, half = dims[:3]
    x, y, z = points
    slope = (top - bottom) / (2 * half)
    cosine = 1 / np.sqrt(1 + slope * slope)
    rho = np.maximum(np.sqrt(x * x + y * y), 1e-6)
    to_side = np.abs(rho - (bottom + top) / 2 - slope * z) * cosine
    cap = half - np.abs(z) < to_side
    side = np.where(cap, np.sign(z), -slope * cosine)
    normal = np.stack([np.where(cap, 0, x / rho * cosine), np.where(cap, 0, y / rho * cosine), side])
    uv = np.stack(
        [np.where(cap, x, np.arctan2(y, x) * np.maximum(bottom, top)), np.where(cap, y, z)]
    )  # fmt: skip
    round_ = np.where(cap, 0, cosine / rho)
    return Surface(normal, uv, np.stack([round_, np.zeros_like(round_)]))


def _limb(points: Floats, dims: Floats) -> Surface:
    lower, upper, half = dims[:3]
    x, y, z = points
    sine = (lower - upper) / (2 * half)
    cosine = np.sqrt(1 - sine * sine)
    low, high = z < lower * sine - half, z > upper * sine + half
    rho = np.maximum(np.sqrt(x * x + y * y), 1e-6)
    # On a ball the normal points away from its centre; on the cone it has the constant rise `sine`.
    rise = np.where(low, (z + half) / lower, np.where(high, (z - half) / upper, sine))
    flat = np.sqrt(np.maximum(1 - rise * rise, 0))
    normal = np.stack([x / rho * flat, y / rho * flat, np.clip(rise, -1, 1)])
    ball = np.where(low, 1 / lower, 1 / upper)
    on_ball = low | high
    curvature = np.stack([np.where(on_ball, ball, cosine / rho), np.where(on_ball, ball, 0)])
    return Surface(normal, np.stack([np.arctan2(y, x) * np.maximum(lower, upper), z]), curvature)


def _ring(points: Floats, dims: Floats) -> Surface:
    radius, tube = dims[0], dims[1]
    x, y, z = points
    rho = np.maximum(np.sqrt(x * x + y * y), 1e-6)
    across = np.stack([rho - radius, z])
    across = across / np.maximum(np.sqrt((across * across).sum(0)), 1e-9)
    normal = np.stack([x / rho * across[0], y / rho * across[0], across[1]])
    uv = np.stack([np.arctan2(y, x) * radius, np.arctan2(across[1], across[0]) * tube])
    return Surface(normal, uv, np.stack([1 / tube, across[0] / rho]))


_SURFACES: dict[Kind, Callable[[Floats, Floats], Surface]] = {
    Kind.SHELL: _shell,
    Kind.BOX: _box,
    Kind.ROUNDED: _rounded,
    Kind.ELLIPSOID: _ellipsoid,
    Kind.FRUSTUM: _frustum,
    Kind.LIMB: _limb,
    Kind.RING: _ring,
}
