"""Fifteen procedural textures. Each returns an albedo for texture coordinates in metres.

Detail finer than the sample's footprint fades out, so that distant patterns turn grey instead of aliasing.
Shape legend: N samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipeline.rooms.scene import TEXTURES, Floats

_LATTICE = 64


@dataclass(frozen=True)
class Spots:
    """N samples to be coloured.

    Attributes:
        u, v: (N,) texture coordinates, metres.
        ground, figure: (N, 3) linear RGB.
        period: (N,) pattern size, metres.
        seed: (N,) variant, as float.
        footprint: (N,) width of a sample on the surface, metres.
        noise: the room's lattice of random numbers, (64, 64).
    """

    u: Floats
    v: Floats
    ground: Floats
    figure: Floats
    period: Floats
    seed: Floats
    footprint: Floats
    noise: Floats

    def mix(self, share: Floats) -> Floats:
        """(N, 3): ground where share is 0, figure where it is 1."""
        return self.ground + (self.figure - self.ground) * np.clip(share, 0, 1)[:, None]

    def fade(self, detail: Floats | float) -> Floats:
        """1 where detail of this size (metres) is resolved, towards 0 where it is finer than a sample."""
        faded: Floats = np.clip(1.6 - 1.6 * self.footprint / detail, 0, 1)
        return faded

    def value(self, frequency_u: float, frequency_v: float, octaves: int = 1) -> Floats:
        """Smooth value noise in [0, 1], mean 1/2: octaves of a random lattice, cubic between its points."""
        total = np.zeros_like(self.u)
        weight = 0.5 if octaves > 1 else 1.0
        for octave in range(octaves):
            scale = 2.0**octave
            total += weight * _lattice(
                self.noise,
                self.u * (frequency_u * scale) + self.seed * 3.7,
                self.v * (frequency_v * scale) + octave * 17,
            )
            weight = weight / 2 if octave < octaves - 2 else weight
        return total


def _lattice(table: Floats, u: Floats, v: Floats) -> Floats:
    floor_u, floor_v = np.floor(u), np.floor(v)
    a, b = u - floor_u, v - floor_v
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    i, j = floor_u.astype(np.int32) % _LATTICE, floor_v.astype(np.int32) % _LATTICE
    flat = table.ravel()
    row, row1 = i * _LATTICE, (i + 1) % _LATTICE * _LATTICE
    j1 = (j + 1) % _LATTICE
    low = flat[row + j] * (1 - a) + flat[row1 + j] * a
    high = flat[row + j1] * (1 - a) + flat[row1 + j1] * a
    value: Floats = low * (1 - b) + high * b
    return value


def _hash(a: Floats, b: Floats | float = 0.0) -> Floats:
    """A number in [0, 1) per pair of integers."""
    hashed: Floats = (np.sin(a * 12.9898 + b * 78.233) * 437.585 % 1).astype(np.float32)
    return hashed


def _to_line(x: Floats) -> Floats:
    """Distance to the nearest integer."""
    distance: Floats = np.abs(x - np.rint(x))
    return distance


def albedo(texture: str, spots: Spots) -> Floats:
    """(N, 3) float32 linear albedo of one texture."""
    return _TEXTURES[texture](spots).astype(np.float32)


def _plain(s: Spots) -> Floats:
    return s.mix(0.3 * s.value(2.5, 2.5, 2))


def _wood(s: Spots) -> Floats:
    plank = np.floor(s.v / s.period)
    grain = s.value(1.3, 18, 2) * s.fade(0.03) + 0.5 * (1 - s.fade(0.03))
    gap = (_to_line(s.v / s.period) < 0.025) * s.fade(s.period * 0.12)
    return s.mix(grain * 0.9 + 0.5 * (_hash(plank, s.seed) - 0.5)) * (1 - 0.5 * gap)[:, None]


def _tiles(s: Spots) -> Floats:
    a, b = s.u / s.period, s.v / s.period
    joint = (np.minimum(_to_line(a), _to_line(b)) < 0.03) * s.fade(s.period * 0.2)
    return s.mix(0.5 * _hash(np.floor(a), np.floor(b))) * (1 - 0.4 * joint)[:, None]


def _checker(s: Spots) -> Floats:
    odd = (np.floor(s.u / s.period) + np.floor(s.v / s.period)) % 2
    sharp = s.fade(s.period)
    return s.mix(odd * sharp + 0.5 * (1 - sharp))


def _brick(s: Spots) -> Floats:
    course = s.v / (s.period * 0.4)
    along: Floats = s.u / s.period + (np.floor(course) % 2 * 0.5).astype(np.float32)
    tone = 0.7 * _hash(np.floor(along), np.floor(course)) + 0.3 * s.value(9, 9)
    joint = ((_to_line(along) < 0.03) | (_to_line(course) < 0.08)) * s.fade(s.period * 0.2)
    return s.mix(tone) * (1 - joint)[:, None] + 0.6 * joint[:, None]


def _stripes(s: Spots) -> Floats:
    sharp = s.fade(s.period * 0.6)
    return s.mix(((s.u / s.period) % 1 < 0.5) * sharp + 0.5 * (1 - sharp))


def _fabric(s: Spots) -> Floats:
    weave = np.sin(s.u * 330) * np.sin(s.v * 330) * s.fade(0.02)
    return s.mix(0.2 + 0.18 * weave + 0.4 * (s.value(7, 7, 2) - 0.3))


def _carpet(s: Spots) -> Floats:
    diamond = np.abs((s.u / s.period) % 1 - 0.5) + np.abs((s.v / s.period) % 1 - 0.5)
    sharp = s.fade(s.period * 0.3)
    bands = np.floor(diamond * 5) % 2
    return s.mix((bands * sharp + 0.5 * (1 - sharp)) * 0.8 + 0.2 * s.value(40, 40) * s.fade(0.03))


def _marble(s: Spots) -> Floats:
    """Cloudy stone with thin veins where a bent wave crosses zero."""
    bent = np.sin(3 * s.u + 2 * s.v + 9 * s.value(1.5, 1.5, 3))
    veins = np.clip(1 - 6 * np.abs(bent), 0, 1)
    return s.mix(0.3 * s.value(4, 4, 2) + 0.6 * veins)


def _dots(s: Spots) -> Floats:
    a, b = (s.u / s.period) % 1 - 0.5, (s.v / s.period) % 1 - 0.5
    sharp = s.fade(s.period * 0.5)
    return s.mix((a * a + b * b < 0.08) * sharp + 0.25 * (1 - sharp))


def _panel(s: Spots) -> Floats:
    a, b = (s.u / s.period) % 1, (s.v / (s.period * 2)) % 1
    edge = (np.minimum(np.minimum(a, 1 - a), 2 * np.minimum(b, 1 - b)) < 0.06) * s.fade(s.period * 0.2)
    grooved: Floats = s.mix(0.3 * s.value(2, 12)) * (1 - 0.35 * edge)[:, None]
    return grooved


def _picture(s: Spots) -> Floats:
    """A landscape: hills below a sky, in the material's two colours."""
    hills = 0.25 * s.value(4, 0, 2) - 0.12 + 0.04 * np.sin(s.u * 9 + s.seed)
    above = np.clip((s.v - hills) * 40, 0, 1)[:, None]
    sky = s.ground * (0.9 + 0.6 * np.clip(s.v, -0.5, 0.5))[:, None]
    land = s.figure * (0.35 + 0.8 * s.value(11, 11, 2))[:, None]
    scene: Floats = np.clip(sky * above + land * (1 - above), 0, 1)
    return scene


def _sky(s: Spots) -> Floats:
    """What a window pane shows: sky above trees."""
    blue = np.array([0.55, 0.75, 1.0], np.float32) * (1.15 + 0.4 * np.clip(s.v, -1, 1))[:, None]
    trees = np.array([0.16, 0.3, 0.1], np.float32) * (0.5 + 0.9 * s.value(16, 16))[:, None]
    above = np.clip((s.v + 0.28 - 0.4 * s.value(4, 4, 3)) * 12, 0, 1)[:, None]
    scene: Floats = blue * above + trees * (1 - above)
    return scene


def _books(s: Spots) -> Floats:
    """Rows of spines of different colours, with the dark of the shelf above them."""
    spine = s.u / 0.036 + s.seed
    which = np.floor(spine)
    tone = np.stack([0.5 + 0.45 * np.sin(which * 2.1 + phase + s.seed) for phase in (0.0, 1.9, 4.0)], -1)
    colours = (0.25 * s.figure + 0.5 * tone.astype(np.float32) ** 2) + 0.04
    gap = (_to_line(spine) < 0.1) * s.fade(0.012)
    inside = (s.v / s.period) % 1 < 0.68 + 0.2 * _hash(which, s.seed)
    return np.where(inside[:, None], colours * (1 - 0.5 * gap)[:, None], s.ground * 0.15)


def _screen(s: Spots) -> Floats:
    """A lit display: a dim ground with brighter windows and lines of text."""
    window = s.value(7, 7, 2) > 0.48
    text = ((s.v * 45) % 1 < 0.5) & (s.value(45, 45) > 0.4)
    glow = 0.1 + 0.5 * window + 0.35 * (window & text) * s.fade(0.02)
    tint = np.array([0.35, 0.6, 1.0], np.float32) * (1 - 0.4 * s.value(3, 3))[:, None]
    return glow[:, None] * tint


_TEXTURES: dict[str, Callable[[Spots], Floats]] = {
    "plain": _plain,
    "wood": _wood,
    "tiles": _tiles,
    "brick": _brick,
    "stripes": _stripes,
    "fabric": _fabric,
    "carpet": _carpet,
    "marble": _marble,
    "checker": _checker,
    "dots": _dots,
    "picture": _picture,
    "sky": _sky,
    "books": _books,
    "screen": _screen,
    "panel": _panel,
}
assert tuple(_TEXTURES) == TEXTURES
