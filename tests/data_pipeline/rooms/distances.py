"""Signed distances to solids, written from their definitions: negative inside, zero on the surface.

Points are (3, N) in the solid's own frame, dims (4,) as in `scene.Kind`. Magnitudes are exact on and near the surface,
bounds elsewhere.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.rooms.scene import Kind

Array = NDArray[Any]


def box_distance(p: Array, half: Array) -> Array:
    q = np.abs(p) - half[:, None]
    distance: Array = np.linalg.norm(np.maximum(q, 0), axis=0) + np.minimum(q.max(0), 0)
    return distance


def cone_distance(p: Array, d: Array) -> Array:
    rho, slope = np.hypot(p[0], p[1]), (d[1] - d[0]) / (2 * d[2])
    side = (rho - (d[0] + d[1]) / 2 - slope * p[2]) / math.hypot(1, slope)
    distance: Array = np.maximum(side, np.abs(p[2]) - d[2])
    return distance


def limb_distance(p: Array, d: Array) -> Array:
    """Smallest distance to the balls between the two ends."""
    s = np.linspace(0, 1, 201)[:, None]
    centre, radius = (2 * s - 1) * d[2], d[0] + (d[1] - d[0]) * s
    distance: Array = (np.sqrt(np.hypot(p[0], p[1])[None] ** 2 + (p[2][None] - centre) ** 2) - radius).min(0)
    return distance


DISTANCE: dict[Kind, Callable[[Array, Array], Array]] = {
    Kind.BOX: lambda p, d: box_distance(p, d[:3]),
    Kind.ROUNDED: lambda p, d: box_distance(p, d[:3] - d[3]) - d[3],
    Kind.ELLIPSOID: lambda p, d: (np.linalg.norm(p / d[:3, None], axis=0) - 1) * d[:3].min(),
    Kind.FRUSTUM: cone_distance,
    Kind.LIMB: limb_distance,
    Kind.RING: lambda p, d: np.hypot(np.hypot(p[0], p[1]) - d[0], p[2]) - d[1],
}
