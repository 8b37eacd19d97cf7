"""Colours of a room: a few hues in harmony, chosen in OKLCH so that equal numbers look equally light and vivid.

Conversion to linear sRGB: B. Ottosson, "A perceptual color space for image processing" (2020).
"""

import math
from random import Random

Rgb = tuple[float, float, float]

# Offsets in degrees from the room's main hue: analogous, complementary, triadic, split-complementary.
_SCHEMES = ((0.0, 28.0, -28.0), (0.0, 180.0, 20.0), (0.0, 120.0, 240.0), (0.0, 150.0, 210.0))
# Lightness, chroma and hue of common woods: pine, oak, beech, teak, walnut, ash.
_WOODS = (
    (0.82, 0.075, 82.0),
    (0.70, 0.080, 72.0),
    (0.76, 0.065, 65.0),
    (0.56, 0.085, 55.0),
    (0.42, 0.055, 50.0),
    (0.78, 0.025, 85.0),
)
_SKINS = ((0.83, 0.05, 55.0), (0.76, 0.065, 55.0), (0.66, 0.075, 55.0), (0.52, 0.07, 50.0), (0.42, 0.055, 50.0))
_HAIRS = ((0.25, 0.02, 50.0), (0.35, 0.05, 50.0), (0.48, 0.07, 60.0), (0.72, 0.09, 85.0), (0.6, 0.01, 90.0))


def oklch(lightness: float, chroma: float, hue_degrees: float) -> Rgb:
    """Linear sRGB of an OKLCH colour, clipped to [0.01, 0.97] (an albedo, never black nor a perfect mirror)."""
    hue = math.radians(hue_degrees)
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (min(0.97, max(0.01, value)) for value in linear)
    return red, green, blue


class Palette:
    """Colour pairs (ground, figure) of one room; the pair is what a texture mixes."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        base = rng.uniform(0, 360)
        self._hues = [base + offset for offset in rng.choice(_SCHEMES)]
        self._woods = rng.sample(_WOODS, 2)
        self._wall_hue = rng.choice((base, 80.0, 80.0, 240.0))

    def wall(self) -> tuple[Rgb, Rgb]:
        """A light, quiet ground with a slightly different figure."""
        lightness, chroma = self._rng.uniform(0.78, 0.95), self._rng.uniform(0.005, 0.055)
        figure = lightness - self._rng.uniform(0.05, 0.14)
        return oklch(lightness, chroma, self._wall_hue), oklch(figure, chroma * 1.4, self._wall_hue)

    def stone(self) -> tuple[Rgb, Rgb]:
        """Tiles, concrete, carpet: medium lightness, nearly neutral."""
        lightness, hue = self._rng.uniform(0.5, 0.88), self._rng.choice((*self._hues, 80.0))
        chroma = self._rng.uniform(0.003, 0.035)
        figure = lightness - self._rng.uniform(0.1, 0.3)
        return oklch(lightness, chroma, hue), oklch(figure, chroma, hue)

    def wood(self) -> tuple[Rgb, Rgb]:
        """One of the room's two woods; the figure is its darker grain."""
        lightness, chroma, hue = self._rng.choice(self._woods)
        lightness += self._rng.uniform(-0.04, 0.04)
        return oklch(lightness, chroma, hue), oklch(lightness - 0.16, chroma, hue - 8)

    def cloth(self) -> tuple[Rgb, Rgb]:
        """A calm colour with a lighter or darker figure of a hue in harmony."""
        lightness, chroma = self._rng.uniform(0.42, 0.8), self._rng.uniform(0.03, 0.11)
        step = self._rng.choice((-0.22, 0.2))
        ground = oklch(lightness, chroma, self._rng.choice(self._hues))
        return ground, oklch(min(0.95, lightness + step), chroma * 0.8, self._rng.choice(self._hues))

    def accent(self) -> tuple[Rgb, Rgb]:
        """A vivid colour for small things, with a pale figure."""
        hue = self._rng.choice(self._hues) + self._rng.uniform(-15, 15)
        return oklch(self._rng.uniform(0.5, 0.75), self._rng.uniform(0.11, 0.18), hue), oklch(0.92, 0.03, hue)

    def toy(self) -> tuple[Rgb, Rgb]:
        """A vivid colour of any hue."""
        hue = self._rng.uniform(0, 360)
        return oklch(self._rng.uniform(0.58, 0.8), 0.17, hue), oklch(0.93, 0.03, hue)

    def white(self) -> tuple[Rgb, Rgb]:
        """Enamel, porcelain."""
        return oklch(0.96, 0.006, 90), oklch(0.9, 0.006, 90)

    def metal(self) -> tuple[Rgb, Rgb]:
        """Grey metal."""
        lightness = self._rng.uniform(0.45, 0.85)
        return oklch(lightness, 0.008, 240), oklch(lightness - 0.08, 0.008, 240)

    def dark(self) -> tuple[Rgb, Rgb]:
        """Nearly black: tyres, screens' frames."""
        return oklch(0.25, 0.01, 260), oklch(0.34, 0.01, 260)

    def leaf(self) -> tuple[Rgb, Rgb]:
        """Green foliage."""
        hue = self._rng.uniform(120, 150)
        return oklch(self._rng.uniform(0.5, 0.7), 0.13, hue), oklch(0.38, 0.09, hue + 8)

    def skin(self) -> tuple[Rgb, Rgb]:
        """Human skin."""
        colour = oklch(*self._rng.choice(_SKINS))
        return colour, colour

    def hair(self) -> tuple[Rgb, Rgb]:
        """Human hair, or fur."""
        lightness, chroma, hue = self._rng.choice(_HAIRS)
        return oklch(lightness, chroma, hue), oklch(lightness - 0.1, chroma, hue)

    def fur(self) -> tuple[Rgb, Rgb]:
        """Animal coat with patches."""
        ground, figure = self._rng.choice(
            (
                ((0.75, 0.09, 65), (0.9, 0.03, 80)),
                ((0.45, 0.05, 55), (0.62, 0.07, 65)),
                ((0.93, 0.02, 85), (0.3, 0.02, 60)),
                ((0.38, 0.01, 270), (0.5, 0.01, 270)),
            )
        )
        return oklch(*ground), oklch(*figure)
