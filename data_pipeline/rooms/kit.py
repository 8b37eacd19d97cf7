"""What builders of things share: the scene, a random generator, the room's colours, and tops to put things on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from data_pipeline.rooms.palette import Palette, Rgb
from data_pipeline.rooms.scene import Frame, Material, Scene, Thing


@dataclass(frozen=True)
class Top:
    """A horizontal surface that can carry things: its frame (origin on it), half sizes, free height above it."""

    frame: Frame
    half_x: float
    half_y: float
    clearance: float = 0.6


@dataclass
class Kit:
    """The shared state of one room's builders."""

    scene: Scene
    rng: Random
    palette: Palette
    tops: list[Top] = field(default_factory=list)

    def thing(self, cls: str, frame: Frame) -> Thing:
        """A new object of a class."""
        return Thing(self.scene, cls, frame)

    def between(self, low: float, high: float) -> float:
        """A uniform number."""
        return self.rng.uniform(low, high)

    def material(
        self,
        colours: tuple[Rgb, Rgb],
        textures: str | Sequence[str] = "plain",
        *,
        gloss: float = 0.1,
        glow: float = 0.0,
    ) -> Material:
        """A material in a pair of colours, of one texture or one drawn from several."""
        texture = textures if isinstance(textures, str) else self.rng.choice(textures)
        return Material(
            texture=texture,
            ground=colours[0],
            figure=colours[1],
            period=self.rng.uniform(0.08, 0.22),
            gloss=gloss,
            glow=glow,
            seed=self.rng.randrange(32),
        )

    def wood(self) -> Material:
        """One of the room's woods."""
        return self.material(self.palette.wood(), "wood", gloss=0.15)

    def lacquer(self) -> Material:
        """What cabinets are made of: wood, paint or panels."""
        if self.rng.random() < 0.5:
            return self.wood()
        colours = self.palette.cloth() if self.rng.random() < 0.5 else self.palette.white()
        return self.material(colours, ("plain", "plain", "panel"), gloss=0.25)

    def cloth(self) -> Material:
        """Upholstery and bedding."""
        return self.material(
            self.palette.cloth(), ("fabric", "fabric", "plain", "stripes", "dots", "checker"), gloss=0.02
        )

    def accent(self) -> Material:
        """A vivid small thing."""
        return self.material(self.palette.accent(), ("plain", "plain", "stripes", "dots"), gloss=0.35)

    def toy(self) -> Material:
        """Bright plastic."""
        return self.material(self.palette.toy(), "plain", gloss=0.4)

    def metal(self) -> Material:
        """Bare metal."""
        return self.material(self.palette.metal(), "plain", gloss=0.6)

    def white(self) -> Material:
        """Enamel or porcelain."""
        return self.material(self.palette.white(), "plain", gloss=0.5)

    def paint(self) -> Material:
        """Quiet paint of skirting, frames and mullions."""
        return self.material(self.palette.white(), "plain", gloss=0.1)

    def dark(self) -> Material:
        """Black plastic or rubber."""
        return self.material(self.palette.dark(), "plain", gloss=0.25)

    def shine(self, colour: Rgb, glow: float) -> Material:
        """A lamp's shade or bulb."""
        return self.material((colour, colour), "plain", gloss=0.0, glow=glow)

    def screen(self) -> Material:
        """A display that is on."""
        return self.material(self.palette.dark(), "screen", gloss=0.3, glow=0.8)


Maker = Callable[[Kit, Frame], None]
"""Builds a thing in a frame."""
