"""Where a ray meets a solid, and what the surface is like there: normal, texture coordinates, principal curvatures.

Everything is in the solid's own frame (centre at the origin, axes of symmetry along z). Rays need not have unit
length; the parameter t is in units of the direction's length. A ray that starts inside a solid does not see it.

Arrays have the coordinate first, then any shape: origins (3, ...), directions (3, ...), dims (4, ...), broadcasting.
"""

from collections.abc import Callable

import numpy as np

from data_pipeline.rooms.scene import Bools, Floats, Kind

MISS = np.float32(1e9)
_NEAR = np.float32(1e-4)  # of the direction's length
_TINY = np.float32(1e-9)
_TOUCH = np.float32(5e-4)  # metres; a marched ray this near has hit
_CONVEX_STEPS, _OTHER_STEPS = 8, 24


def intersect(kind: Kind, origin: Floats, direction: Floats, dims: Floats) -> Floats:
    """First t at which rays enter solids of one kind; `MISS` where they do not. float32, the broadcast ray shape."""
    return _INTERSECTIONS[kind](origin, direction, dims)


def _slabs(origin: Floats, direction: Floats, half: Floats) -> tuple[Floats, Floats]:
    """Entry and exit of an axis-aligned box (entry > exit: missed)."""
    inverse = 1 / np.where(np.abs(direction) < _TINY, _TINY, direction)
    middle = -origin * inverse
    reach = half * np.abs(inverse)
    entry: Floats = (middle - reach).max(0)
    leave: Floats = (middle + reach).min(0)
    return entry, leave


def _box(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    entry, leave = _slabs(origin, direction, dims[:3])
    return np.where((leave >= entry) & (entry > _NEAR), entry, MISS)


def _rounded(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    half, radius = dims[:3], dims[3]
    entry, leave = _slabs(origin, direction, half)
    t = np.where((leave >= entry) & (entry > _NEAR), entry, MISS)
    inner = half - radius
    beyond = (np.abs(origin + t * direction) > inner).sum(0)

    def distance(p: Floats, size: Floats) -> Floats:
        d: Floats = np.sqrt((np.maximum(np.abs(p) - size[:3], 0) ** 2).sum(0)) - size[3]
        return d

    # A flat part is hit where only the coordinate across the face lies beyond the inner box.
    size = np.concatenate([inner, radius[None]])
    return _march(distance, origin, direction, size, t, leave, (t < MISS) & (beyond > 1), convex=True)


def _ring(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    radius, tube = dims[0], dims[1]
    entry, leave = _slabs(origin, direction, np.stack([radius + tube, radius + tube, tube]))
    t = np.where((leave >= entry) & (entry > _NEAR), entry, MISS)

    def distance(p: Floats, size: Floats) -> Floats:
        d: Floats = np.hypot(np.hypot(p[0], p[1]) - size[0], p[2]) - size[1]
        return d

    return _march(distance, origin, direction, dims, t, leave, t < MISS, convex=False)


def _march(
    distance: Callable[[Floats, Floats], Floats],
    origin: Floats,
    direction: Floats,
    size: Floats,
    t: Floats,
    leave: Floats,
    chosen: Bools,
    *,
    convex: bool,
) -> Floats:
    """Sphere tracing (Hart 1996) from t to `leave` for the chosen rays; the others keep their t.

    The distance to a convex solid is convex along a ray. There the secant never passes the surface, and rays that
    graze it, for which spheres shrink too early, converge in a few steps.
    """
    where = np.nonzero(chosen)
    if len(where[0]) == 0:
        return t
    o, d, s = (np.stack([np.broadcast_to(row, chosen.shape)[where] for row in a]) for a in (origin, direction, size))
    speed = np.sqrt((d * d).sum(0))
    now, end = t[where], leave[where]
    gap = distance(o + now * d, s)
    step = gap / speed
    for _ in range(_CONVEX_STEPS if convex else _OTHER_STEPS):
        now = now + step
        previous, gap = gap, distance(o + now * d, s)
        safe = gap / speed
        closing = np.maximum(previous - gap, _TINY)
        step = np.where(previous > gap, np.clip(gap * step / closing, safe, 8 * safe), safe) if convex else safe
    t[where] = np.where((np.abs(gap) < _TOUCH) & (now < end + _NEAR), now, MISS)
    return t


def _to_closest(origin: Floats, direction: Floats) -> tuple[Floats, Floats, Floats]:
    """Shift of t to the ray's point nearest to the centre, that point, and |direction|^2.

    Quadratics solved from there keep float32 accurate for a thin solid far away.
    """
    square = (direction * direction).sum(0)
    shift = -(origin * direction).sum(0) / square
    return shift, origin + shift * direction, square


def _ellipsoid(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    radii = dims[:3]
    shift, q, square = _to_closest(origin / radii, direction / radii)
    rest = (1 - (q * q).sum(0)) / square
    t = shift - np.sqrt(np.maximum(rest, 0))
    return np.where((rest > 0) & (t > _NEAR), t, MISS)


def _ball(q: Floats, direction: Floats, square: Floats, height: Floats, radius: Floats) -> Floats:
    """Entry of a ball on the z axis, relative to q; MISS if missed."""
    z = q[2] - height
    b = -height * direction[2]  # of (q - centre) . direction, for q is perpendicular to the direction
    rest = b * b - square * (q[0] * q[0] + q[1] * q[1] + z * z - radius * radius)
    return np.where(rest > 0, (-b - np.sqrt(np.maximum(rest, 0))) / square, MISS)


def _side(q: Floats, direction: Floats, low: Floats, high: Floats, low_radius: Floats, high_radius: Floats) -> Floats:
    """Entry through the side of a cone between two heights, relative to q; MISS if missed."""
    slope = (high_radius - low_radius) / (high - low)
    at_q = low_radius + slope * (q[2] - low)
    rise = slope * direction[2]
    a = direction[0] * direction[0] + direction[1] * direction[1] - rise * rise
    b = q[0] * direction[0] + q[1] * direction[1] - rise * at_q
    c = q[0] * q[0] + q[1] * q[1] - at_q * at_q
    rest = b * b - a * c
    # Entering, the ray goes against the outward normal, which picks the smaller root where a > 0 and the larger
    # (-b - sqrt) / a, too, where a < 0.
    t = (-b - np.sqrt(np.maximum(rest, 0))) / np.where(np.abs(a) < _TINY, _TINY, a)
    z = q[2] + t * direction[2]
    return np.where((rest > 0) & (z >= low) & (z <= high), t, MISS)


def _frustum(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    bottom, top, half = dims[0], dims[1], dims[2]
    shift, q, _ = _to_closest(origin, direction)
    best = _side(q, direction, -half, half, bottom, top)
    down = direction[2] < 0
    dz = np.where(np.abs(direction[2]) < _TINY, _TINY, direction[2])
    t = (np.where(down, half, -half) - q[2]) / dz  # only the cap that faces the ray can be entered
    x, y = q[0] + t * direction[0], q[1] + t * direction[1]
    best = np.minimum(best, np.where(x * x + y * y <= np.where(down, top, bottom) ** 2, t, MISS))
    return _shifted(best, shift)


def _limb(origin: Floats, direction: Floats, dims: Floats) -> Floats:
    lower, upper, half = dims[0], dims[1], dims[2]
    shift, q, square = _to_closest(origin, direction)
    sine = (lower - upper) / (2 * half)  # the tangent cone touches the balls where the normal rises by this
    cosine = np.sqrt(1 - sine * sine)
    best = _side(q, direction, lower * sine - half, upper * sine + half, lower * cosine, upper * cosine)
    best = np.minimum(best, _ball(q, direction, square, -half, lower))
    return _shifted(np.minimum(best, _ball(q, direction, square, half, upper)), shift)


def _shifted(t: Floats, shift: Floats) -> Floats:
    total = t + shift
    return np.where((t < MISS) & (total > _NEAR), total, MISS)


_INTERSECTIONS: dict[Kind, Callable[[Floats, Floats, Floats], Floats]] = {
    Kind.BOX: _box,
    Kind.ROUNDED: _rounded,
    Kind.ELLIPSOID: _ellipsoid,
    Kind.FRUSTUM: _frustum,
    Kind.LIMB: _limb,
    Kind.RING: _ring,
}
