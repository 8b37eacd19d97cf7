"""The floor plan: places for furniture that do not overlap, and places on walls.

A footprint is an upright box, turned by `yaw`. Two of them collide if their heights do and no axis of their rectangles
separates them (separating axis theorem). What hangs on a wall has a footprint, too, that begins above the floor.
"""

import math
from dataclasses import dataclass, field
from random import Random

from data_pipeline.rooms.scene import Frame

_TRIES = 14
_GAP = 0.03  # metres kept free between things
# Yaw of a thing whose back is to the wall, per wall: -x, +x, -y, +y.
_WALL_YAW = (math.pi / 2, -math.pi / 2, math.pi, 0.0)


@dataclass(frozen=True)
class Footprint:
    """The space of a thing: centre and half sizes of its rectangle along its own axes, yaw (radians), top and base."""

    x: float
    y: float
    half_x: float
    half_y: float
    yaw: float
    height: float
    base: float = 0.0

    def corners(self) -> tuple[tuple[float, float], ...]:
        """The four corners, in order round the rectangle."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        ends = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        offsets = [(i * self.half_x, j * self.half_y) for i, j in ends]
        return tuple((self.x + a * cos - b * sin, self.y + a * sin + b * cos) for a, b in offsets)


def overlaps(first: Footprint, second: Footprint, gap: float = 0.0) -> bool:
    """Whether two footprints share heights and come nearer to each other than `gap` metres along every axis of both."""
    if first.base >= second.height or second.base >= first.height:
        return False
    corners = first.corners(), second.corners()
    for yaw in (first.yaw, first.yaw + math.pi / 2, second.yaw, second.yaw + math.pi / 2):
        cos, sin = math.cos(yaw), math.sin(yaw)
        a, b = ([x * cos + y * sin for x, y in points] for points in corners)
        if max(a) + gap <= min(b) or max(b) + gap <= min(a):
            return False
    return True


@dataclass
class FloorPlan:
    """Half sizes and height of a room, what stands in it and what its walls carry.

    Attributes:
        footprints: what stands on the floor or hangs on walls.
        reserved: spaces that stay free (before doors, for feet).
    """

    half_width: float
    half_depth: float
    height: float
    rng: Random
    footprints: list[Footprint] = field(default_factory=list)
    reserved: list[Footprint] = field(default_factory=list)
    _on_walls: list[tuple[int, float, float, float, float]] = field(default_factory=list)

    def is_free(self, footprint: Footprint) -> bool:
        """Whether the footprint lies in the room and apart from everything that stands there."""
        inside = all(
            abs(x) <= self.half_width + 1e-6 and abs(y) <= self.half_depth + 1e-6 for x, y in footprint.corners()
        )
        return inside and not any(overlaps(footprint, other, _GAP) for other in (*self.footprints, *self.reserved))

    def place(self, frame: Frame, half_x: float, half_y: float, height: float) -> Frame | None:
        """Claim the floor under a thing at `frame`; None if it is taken."""
        footprint = Footprint(frame.x, frame.y, half_x, half_y, frame.yaw, height)
        if not self.is_free(footprint):
            return None
        self.footprints.append(footprint)
        return frame

    def anywhere(
        self, half_x: float, half_y: float, height: float, *, spread: float = 1.0, yaw: float | None = None
    ) -> Frame | None:
        """Claim a place in the open, within `spread` of the room's half sizes; at any yaw unless one is given."""
        for _ in range(_TRIES):
            x = self.rng.uniform(-spread, spread) * self.half_width
            y = self.rng.uniform(-spread, spread) * self.half_depth
            turn = self.rng.uniform(-math.pi, math.pi) if yaw is None else yaw
            if frame := self.place(Frame(x, y, 0.0, turn), half_x, half_y, height):
                return frame
        return None

    def against_wall(self, half_x: float, half_y: float, height: float) -> Frame | None:
        """Claim a place with its back to a wall where no window, door or picture is hidden; None if there is none."""
        for _ in range(_TRIES):
            wall = self._random_wall()
            length = self._length(wall)
            if half_x + 0.02 > length:
                continue
            along = self.rng.uniform(half_x - length + 0.02, length - half_x - 0.02)
            spot = (wall, along - half_x, along + half_x, 0.0, height)
            if self._wall_taken(spot):
                continue
            if frame := self.place(self._wall_frame(wall, along, half_y + 0.015), half_x, half_y, height):
                self._on_walls.append(spot)
                return frame
        return None

    def on_wall(
        self, half_x: float, low: float, high: float, *, depth: float, margin: float = 0.08, wall: int | None = None
    ) -> Frame | None:
        """Claim a rectangle of a wall between two heights, and the space of a depth before it.

        The frame's origin is on the wall at the rectangle's middle, its back to the wall.
        """
        for _ in range(_TRIES):
            side = self._random_wall() if wall is None else wall
            length = self._length(side)
            if half_x + 0.1 > length:
                continue
            along = self.rng.uniform(half_x - length + 0.1, length - half_x - 0.1)
            spot = (side, along - half_x - margin, along + half_x + margin, low, high)
            middle = self._wall_frame(side, along, depth / 2)
            body = Footprint(middle.x, middle.y, half_x, depth / 2, middle.yaw, high, low)
            if not self._wall_taken(spot) and self.is_free(body):
                self._on_walls.append(spot)
                self.footprints.append(body)
                return self._wall_frame(side, along, 0.0).at(0, 0, (low + high) / 2)
        return None

    def reserve(self, frame: Frame, half_x: float, half_y: float, height: float) -> bool:
        """Keep a space free from now on; False if something stands in it already."""
        space = Footprint(frame.x, frame.y, half_x, half_y, frame.yaw, height)
        free = self.is_free(space)
        self.reserved.append(space)
        return free

    def _random_wall(self) -> int:
        """A wall, the longer ones more often."""
        weights = (self.half_depth, self.half_depth, self.half_width, self.half_width)
        return self.rng.choices(range(4), weights)[0]

    def _length(self, wall: int) -> float:
        return self.half_depth if wall < 2 else self.half_width

    def _wall_taken(self, spot: tuple[int, float, float, float, float]) -> bool:
        wall, left, right, low, high = spot
        return any(
            wall == w and left < r and l_ < right and low < hi and lo < high for w, l_, r, lo, hi in self._on_walls
        )

    def _wall_frame(self, wall: int, along: float, away: float) -> Frame:
        """The frame `along` a wall (metres from its middle) and `away` from it, with its back to it."""
        side = -1 if wall % 2 == 0 else 1
        if wall < 2:
            return Frame(side * (self.half_width - away), along, 0.0, _WALL_YAW[wall])
        return Frame(along, side * (self.half_depth - away), 0.0, _WALL_YAW[wall])
