"""Places pieces of furniture in one room: claims the floor, builds the piece, remembers what is worth seeing."""

import math
from functools import partial

from data_pipeline.rooms import furniture
from data_pipeline.rooms.kit import Kit, Maker
from data_pipeline.rooms.layout import FloorPlan
from data_pipeline.rooms.scene import Frame, Point
from data_pipeline.rooms.smalls import Item


class Furnisher:
    """A room being furnished.

    Attributes:
        kit, plan, rng: what builders and placement use.
        sights: points worth looking at.
        seats: places where a person may sit.
    """

    def __init__(self, kit: Kit, plan: FloorPlan) -> None:
        self.kit, self.plan, self.rng = kit, plan, kit.rng
        self.sights: list[Point] = []
        self.seats: list[Frame] = []

    def along_wall(
        self, make: Maker, half_x: float, half_y: float, height: float, *, sight: bool = True
    ) -> Frame | None:
        """Build a piece with its back to a wall, where there is room for its half sizes (metres)."""
        return self._build(make, self.plan.against_wall(half_x, half_y, height), height, sight)

    def in_the_open(
        self,
        make: Maker,
        half_x: float,
        half_y: float,
        height: float,
        *,
        spread: float = 0.85,
        yaw: float | None = None,
        sight: bool = False,
    ) -> Frame | None:
        """Build a piece anywhere within `spread` of the room's half sizes, at any yaw unless one is given."""
        return self._build(make, self.plan.anywhere(half_x, half_y, height, spread=spread, yaw=yaw), height, sight)

    def at(self, make: Maker, frame: Frame, half_x: float, half_y: float, height: float) -> None:
        """Build a piece at a given place if it is free."""
        self._build(make, self.plan.place(frame, half_x, half_y, height), height, False)

    def on_floor(self, item: Item, scale: float = 1.0, *, sight: bool = False) -> None:
        """Stand a small thing on the floor, anywhere and at a scale."""

        def scaled(kit: Kit, frame: Frame) -> None:
            item.make(kit, frame.at(0, 0, scale=scale))

        self.in_the_open(scaled, item.half_x * scale, item.half_y * scale, item.height * scale, sight=sight)

    def cabinet(self, cls: str, half_x: float, half_y: float, height: float, *, sight: bool = False) -> None:
        """A closed cabinet against a wall."""
        make = partial(furniture.cabinet, cls=cls, half_x=half_x, half_y=half_y, height=height)
        self.along_wall(make, half_x, half_y, height, sight=sight)

    def shelf(self, *, books: float = 1.0, sight: bool = True) -> None:
        """A bookshelf against a wall, a share of whose boards carries books."""
        half_x, height = self.rng.uniform(0.38, 0.6), self.rng.uniform(1.3, 2.05)
        make = partial(furniture.bookshelf, half_x=half_x, height=height, books=books)
        self.along_wall(make, half_x, 0.16, height, sight=sight)

    def sofa(self, cls: str, half_x: float) -> None:
        """A sofa or armchair against a wall; someone may sit on it if there is floor for their feet."""
        half_y = 0.44
        frame = self.along_wall(partial(furniture.sofa, cls=cls, half_x=half_x, half_y=half_y), half_x, half_y, 0.84)
        if frame and self.plan.reserve(frame.at(0, -half_y - 0.2), half_x, 0.16, 0.6):
            spread = half_x - 0.4
            self.seats.append(frame.at(self.rng.uniform(-spread, spread), -0.03))

    def table_with_chairs(self, cls: str, *, chairs: int, spread: float = 0.3) -> None:
        """A table in the open with chairs around it, drawn up to its edge but not into it."""
        is_round = self.rng.random() < 0.3
        half_x = self.rng.uniform(0.45, 0.6) if is_round else self.rng.uniform(0.55, 0.85)
        half_y = half_x if is_round else self.rng.uniform(0.4, 0.48)
        make = partial(furniture.table, cls=cls, half_x=half_x, half_y=half_y, height=0.74)
        yaw = self.rng.choice((0.0, math.pi / 2))
        table = self.in_the_open(make, half_x, half_y, 0.74, spread=spread, yaw=yaw, sight=True)
        if table is None:
            return
        side, end, x = half_y + 0.27, half_x + 0.27, 0.5 * half_x
        ends = [(end, 0.0, -math.pi / 2), (-end, 0.0, math.pi / 2)]
        sides = [(0.0, side, 0.0), (0.0, -side, math.pi)]
        if not is_round:
            sides = [(-x, side, 0.0), (x, -side, math.pi), (x, side, 0.0), (-x, -side, math.pi)]
        for x, y, turn in [*sides, *ends][:chairs]:
            place = table.at(x, y, turn=turn + self.rng.uniform(-0.08, 0.08))
            self.at(furniture.chair, place, 0.22, 0.22, 0.9)

    def _build(self, make: Maker, frame: Frame | None, height: float, sight: bool) -> Frame | None:
        if frame is None:
            return None
        make(self.kit, frame)
        if sight:
            self.sights.append((frame.x, frame.y, min(height * 0.6, 1.0)))
        return frame
