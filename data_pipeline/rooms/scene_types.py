"""Ten kinds of rooms, each with the furniture by which one knows it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from data_pipeline.rooms import appliances, building, furniture, people, smalls, toys
from data_pipeline.rooms.kit import Kit
from data_pipeline.rooms.layout import FloorPlan, WallSpot
from data_pipeline.rooms.palette import Palette
from data_pipeline.rooms.scene import Frame, Point, Scene

# Half width and half depth ranges, metres.
_SIZES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "corridor": ((0.85, 1.15), (2.6, 3.6)),
    "bathroom": ((1.25, 1.7), (1.4, 1.9)),
}
_SIZE = ((1.7, 2.5), (1.8, 2.7))


@dataclass(frozen=True)
class Room:
    """A furnished room.

    Attributes:
        scene_type: key of `catalogue.PLACES_INDEX`.
        scene: its solids.
        plan: its floor plan, with the footprints of all furniture.
        sights: points worth looking at: what makes the room what it is, and people.
        lamp: centre of the ceiling lamp's light.
        daylight: a point just inside a window, or None.
    """

    scene_type: str
    scene: Scene
    plan: FloorPlan
    sights: tuple[Point, ...]
    lamp: Point
    daylight: Point | None


class _Furnisher:
    """Places pieces in one room and remembers what is worth seeing."""

    def __init__(self, kit: Kit, plan: FloorPlan) -> None:
        self.kit, self.plan, self.rng = kit, plan, kit.rng
        self.sights: list[Point] = []
        self.seats: list[Frame] = []

    def along_wall(
        self, build: Callable[[Frame], None], half_x: float, half_y: float, height: float, *, sight: bool = True
    ) -> Frame | None:
        frame = self.plan.against_wall(half_x, half_y, height)
        return self._build(build, frame, height, sight)

    def in_the_open(
        self,
        build: Callable[[Frame], None],
        half_x: float,
        half_y: float,
        height: float,
        *,
        spread: float = 0.85,
        yaw: float | None = None,
        sight: bool = False,
    ) -> Frame | None:
        frame = self.plan.anywhere(half_x, half_y, height, spread=spread, yaw=yaw)
        return self._build(build, frame, height, sight)

    def at(self, build: Callable[[Frame], None], frame: Frame, half_x: float, half_y: float, height: float) -> None:
        self._build(build, self.plan.place(frame, half_x, half_y, height), height, False)

    def _build(self, build: Callable[[Frame], None], frame: Frame | None, height: float, sight: bool) -> Frame | None:
        if frame is None:
            return None
        build(frame)
        if sight:
            self.sights.append((frame.x, frame.y, min(height * 0.6, 1.0)))
        return frame

    def cabinet(self, cls: str, half_x: float, half_y: float, height: float, *, sight: bool = False) -> Frame | None:
        def build(frame: Frame) -> None:
            furniture.cabinet(self.kit, frame, cls, half_x, half_y, height)

        return self.along_wall(build, half_x, half_y, height, sight=sight)

    def shelf(self, *, books: float = 1.0, sight: bool = True) -> Frame | None:
        half_x, height = self.rng.uniform(0.38, 0.6), self.rng.uniform(1.3, 2.05)

        def build(frame: Frame) -> None:
            furniture.bookshelf(self.kit, frame, half_x, height, books=books)

        return self.along_wall(build, half_x, 0.16, height, sight=sight)

    def seat(self, cls: str, half_x: float) -> Frame | None:
        def build(frame: Frame) -> None:
            furniture.sofa(self.kit, frame, cls, half_x, 0.44)

        frame = self.along_wall(build, half_x, 0.44, 0.84)
        if frame:
            self.seats.append(frame.at(self.rng.uniform(-0.4, 0.4) * half_x, 0.05))
        return frame

    def table_with_chairs(self, cls: str, *, chairs: int, spread: float = 0.3) -> None:
        """A table in the open with chairs around it, tucked up to its edge but not into it."""
        round_ = self.rng.random() < 0.3
        half_x = self.rng.uniform(0.45, 0.6) if round_ else self.rng.uniform(0.55, 0.85)
        half_y = half_x if round_ else self.rng.uniform(0.4, 0.48)

        def build(frame: Frame) -> None:
            furniture.table(self.kit, frame, cls, half_x, half_y, 0.74)

        table = self.in_the_open(
            build, half_x, half_y, 0.74, spread=spread, yaw=self.rng.choice((0, math.pi / 2)), sight=True
        )
        if table is None:
            return
        away = half_y + 0.27
        ends = half_x + 0.27
        places = [(-0.5 * half_x, away, 0.0), (0.5 * half_x, -away, math.pi), (0.5 * half_x, away, 0.0),
                  (-0.5 * half_x, -away, math.pi), (ends, 0.0, -math.pi / 2), (-ends, 0.0, math.pi / 2)]  # fmt: skip
        if round_:
            places = [(0.0, away, 0.0), (0.0, -away, math.pi), *places[4:]]
        for x, y, turn in places[:chairs]:
            jitter = self.rng.uniform(-0.08, 0.08)
            self.at(lambda f: furniture.chair(self.kit, f), table.at(x, y, turn=turn + jitter), 0.22, 0.22, 0.9)

    def standing(self, make: smalls.Maker, half: float, height: float, scale: float = 1.0) -> Frame | None:
        """A free-standing thing anywhere on the floor."""

        def build(frame: Frame) -> None:
            make(self.kit, Frame(frame.x, frame.y, 0.0, frame.yaw, scale))

        return self.in_the_open(build, half * scale, half * scale, height * scale)


def _bedroom(f: _Furnisher) -> None:
    half_x = f.rng.uniform(0.5, 0.85)

    def build(frame: Frame) -> None:
        furniture.bed(f.kit, frame, half_x)

    bed = f.along_wall(build, half_x, 1.04, 1.0)
    if bed:
        for side in (-1, 1):
            f.at(
                lambda frame: furniture.cabinet(f.kit, frame, "nightstand", 0.22, 0.2, 0.5),
                bed.at(side * (half_x + 0.27), 0.82), 0.22, 0.2, 0.5,
            )  # fmt: skip
    f.cabinet("wardrobe", f.rng.uniform(0.45, 0.75), 0.3, furniture.wardrobe_height(f.kit), sight=True)
    f.cabinet("cabinet", f.rng.uniform(0.35, 0.55), 0.22, f.rng.uniform(0.7, 0.9))


def _living_room(f: _Furnisher) -> None:
    f.seat("sofa", f.rng.uniform(0.85, 1.1))
    half_x = f.rng.uniform(0.65, 0.85)
    f.along_wall(lambda frame: furniture.tv_bench(f.kit, frame, half_x), half_x, 0.2, 1.2)
    f.seat("armchair", 0.44)
    half = f.rng.uniform(0.3, 0.42)

    def coffee_table(frame: Frame) -> None:
        furniture.table(f.kit, frame, "coffee_table", 0.5, half, 0.42)

    f.in_the_open(coffee_table, 0.5, half, 0.42, spread=0.35, yaw=0.0, sight=True)
    if f.rng.random() < 0.4:
        f.shelf(sight=False)


def _kitchen(f: _Furnisher) -> None:
    f.along_wall(lambda frame: appliances.stove(f.kit, frame), 0.3, 0.3, 0.9)
    f.along_wall(lambda frame: appliances.kitchen_sink(f.kit, frame), 0.4, 0.3, 0.9)
    height = f.rng.uniform(1.5, 1.85)
    f.along_wall(lambda frame: appliances.fridge(f.kit, frame, height), 0.32, 0.32, height)
    for _ in range(3):
        half_x = f.rng.uniform(0.3, 0.5)
        counter = f.along_wall(
            lambda frame, half_x=half_x: appliances.counter(f.kit, frame, half_x), half_x, 0.3, 0.9, sight=False
        )
        if counter and f.rng.random() < 0.3:
            f.kit.tops.pop()
            appliances.microwave(f.kit, counter.at(0, 0.05, 0.9))
        if spot := f.plan.on_wall(half_x, 1.4, 2.0, margin=0.01):
            appliances.wall_cupboard(f.kit, spot.frame, half_x, 0.3)
    if f.rng.random() < 0.6:
        f.table_with_chairs("dining_table", chairs=f.rng.choice((2, 3, 4)))


def _bathroom(f: _Furnisher) -> None:
    f.along_wall(lambda frame: appliances.bathtub(f.kit, frame), 0.8, 0.38, 0.75)
    f.along_wall(lambda frame: appliances.toilet(f.kit, frame), 0.24, 0.36, 0.8)
    basin = f.along_wall(lambda frame: appliances.washbasin(f.kit, frame), 0.28, 0.25, 1.0)
    if basin is None:
        f.cabinet("cabinet", 0.3, 0.16, 0.8)
    if f.rng.random() < 0.5:
        f.along_wall(lambda frame: appliances.washer(f.kit, frame), 0.3, 0.3, 0.86)
    for _ in range(2):
        if spot := f.plan.on_wall(0.28, 1.0, 1.6):
            appliances.towel(f.kit, spot.frame)
    if f.rng.random() < 0.7:
        f.cabinet("cabinet", 0.26, 0.16, f.rng.uniform(0.6, 0.9))


def _office(f: _Furnisher) -> None:
    for _ in range(2):
        half_x = f.rng.uniform(0.6, 0.75)
        desk = f.along_wall(lambda frame, half_x=half_x: furniture.workplace(f.kit, frame, half_x), half_x, 0.36, 1.15)
        if desk:
            place = desk.at(f.rng.uniform(-0.15, 0.15), -0.66, turn=math.pi + f.rng.uniform(-0.1, 0.1))
            f.at(lambda frame: furniture.chair(f.kit, frame, 0.23), place, 0.23, 0.23, 0.9)
    f.shelf(books=0.8)
    height = f.rng.choice((0.7, 1.05, 1.35))
    f.along_wall(lambda frame: appliances.file_cabinet(f.kit, frame, height), 0.24, 0.3, height)
    f.standing(appliances.bin_, 0.16, 0.37)


def _dining_room(f: _Furnisher) -> None:
    f.table_with_chairs("dining_table", chairs=f.rng.choice((4, 5, 6)), spread=0.15)
    f.cabinet("cabinet", f.rng.uniform(0.5, 0.75), 0.22, f.rng.uniform(0.8, 1.0), sight=True)
    f.cabinet("cabinet", f.rng.uniform(0.4, 0.5), 0.2, f.rng.uniform(1.6, 2.0))


def _corridor(f: _Furnisher) -> None:
    for _ in range(2):
        building.door(f.kit, f.plan)
    f.cabinet("cabinet", f.rng.uniform(0.35, 0.5), 0.15, f.rng.uniform(0.75, 0.95), sight=True)
    if f.rng.random() < 0.5:
        f.along_wall(lambda frame: toys.bicycle(f.kit, frame), 0.88, 0.25, 1.0)
    if f.rng.random() < 0.6:
        f.cabinet("wardrobe", f.rng.uniform(0.3, 0.45), 0.16, furniture.wardrobe_height(f.kit))
    f.along_wall(lambda frame: smalls.umbrella(f.kit, frame), 0.08, 0.08, 0.95, sight=False)


def _playroom(f: _Furnisher) -> None:
    def low_table(frame: Frame) -> None:
        furniture.table(f.kit, frame, "coffee_table", 0.45, 0.45, 0.45)

    table = f.in_the_open(low_table, 0.45, 0.45, 0.45, spread=0.3, sight=True)
    if table:
        for side in (-1, 1):
            f.at(lambda frame: furniture.stool(f.kit, frame, 0.16), table.at(side * 0.66, 0), 0.17, 0.17, 0.5)
    f.shelf(books=0.25)
    f.cabinet("cabinet", f.rng.uniform(0.45, 0.7), 0.22, f.rng.uniform(0.5, 0.75), sight=True)
    for make, half, height in f.rng.sample(smalls.TOYS, 6):
        f.standing(make, half, height, f.rng.uniform(1.1, 1.8))
    f.standing(smalls.teddy, 0.15, 0.36, f.rng.uniform(1.6, 2.4))


def _storage_room(f: _Furnisher) -> None:
    f.shelf(books=0.1)
    if f.rng.random() < 0.6:
        f.along_wall(lambda frame: toys.bicycle(f.kit, frame), 0.88, 0.25, 1.0)
    if f.rng.random() < 0.5:
        f.standing(toys.motorbike, 0.26, 0.28, f.rng.uniform(2.2, 3.0))
    for _ in range(7):
        half = f.rng.uniform(0.22, 0.36)
        f.in_the_open(
            lambda frame, half=half: appliances.cartons(f.kit, frame, half), half, half, 0.9, sight=f.rng.random() < 0.4
        )
    for _ in range(2):
        f.standing(appliances.barrel, 0.28, 0.82)


def _library(f: _Furnisher) -> None:
    for _ in range(5):
        f.shelf()
    if f.rng.random() < 0.5:
        f.table_with_chairs("desk", chairs=2)
    else:
        f.seat("armchair", 0.44)


_TYPES: dict[str, tuple[Callable[[_Furnisher], None], tuple[tuple[smalls.Maker, float, float], ...]]] = {
    "bathroom": (_bathroom, smalls.KITCHEN),
    "bedroom": (_bedroom, smalls.HOUSEHOLD),
    "corridor": (_corridor, smalls.HOUSEHOLD),
    "dining_room": (_dining_room, smalls.KITCHEN),
    "kitchen": (_kitchen, smalls.KITCHEN),
    "library": (_library, smalls.DISPLAY),
    "living_room": (_living_room, smalls.DISPLAY),
    "office": (_office, smalls.DESK),
    "playroom": (_playroom, smalls.TOYS),
    "storage_room": (_storage_room, smalls.DISPLAY),
}


def furnish(rng: Random) -> Room:
    """A room of a random type, furnished."""
    scene_type = rng.choice(tuple(_TYPES))
    widths, depths = _SIZES.get(scene_type, _SIZE)
    plan = FloorPlan(rng.uniform(*widths), rng.uniform(*depths), rng.uniform(2.35, 2.9), rng)
    kit = building.empty_room(rng, Palette(rng), scene_type, plan)
    build, menu = _TYPES[scene_type]
    furnisher = _Furnisher(kit, plan)
    if rng.random() < 0.7:
        building.door(kit, plan)
    windows = [building.window(kit, plan) for _ in range(0 if scene_type == "corridor" else rng.choice((0, 1, 1, 2)))]
    build(furnisher)
    _extras(furnisher, scene_type)
    _people(furnisher)
    for top in list(kit.tops):
        smalls.fill_top(kit, top, menu, 0.65)
    if scene_type != "storage_room":
        building.pictures(kit, plan, rng.choice((1, 2, 3)))
        if scene_type != "bathroom" and rng.random() < 0.55:
            building.rug(kit, plan)
    lamp = Frame(rng.uniform(-0.3, 0.3) * plan.half_width, rng.uniform(-0.3, 0.3) * plan.half_depth, plan.height)
    smalls.ceiling_lamp(kit, lamp)
    return Room(
        scene_type=scene_type,
        scene=kit.scene,
        plan=plan,
        sights=tuple(furnisher.sights) or ((0.0, 0.0, 0.8),),
        lamp=lamp.point((0, 0, -0.3)),
        daylight=_daylight(windows),
    )


def _daylight(windows: list[WallSpot | None]) -> Point | None:
    first = next((spot for spot in windows if spot), None)
    return first.frame.point((0, -0.25, 0.1)) if first else None


def _extras(f: _Furnisher, scene_type: str) -> None:
    """Things that may stand in rooms of several types: plants, a lamp, pets."""
    rng = f.rng
    if scene_type in ("bathroom", "storage_room"):
        return
    if rng.random() < 0.45:
        scale = rng.uniform(1.2, 2.1)
        f.along_wall(
            lambda frame: smalls.plant(f.kit, frame.at(0, 0, scale=scale)), 0.2 * scale, 0.2 * scale, 1.0, sight=False
        )
    if rng.random() < 0.3:
        f.along_wall(lambda frame: furniture.floor_lamp(f.kit, frame), 0.2, 0.2, 1.75, sight=False)
    if rng.random() < 0.12:
        f.along_wall(lambda frame: smalls.guitar(f.kit, frame), 0.2, 0.15, 1.1, sight=False)
    if rng.random() < 0.35:
        make, scale = rng.choice(((toys.dog, 1.3), (toys.cat, 1.25)))
        if pet := f.standing(make, 0.26, 0.42, scale):
            f.sights.append((pet.x, pet.y, 0.3))
    if rng.random() < 0.15:
        f.standing(smalls.ball, 0.13, 0.26, 1.2)


def _people(f: _Furnisher) -> None:
    """Half of the rooms have one or two people, standing about or sitting on a sofa."""
    if f.rng.random() < 0.45:
        return
    if f.seats and f.rng.random() < 0.5:
        seat = f.rng.choice(f.seats)
        people.person(f.kit, seat, "sitting")
        f.sights += [(seat.x, seat.y, 0.9)] * 2
    for _ in range(f.rng.choice((0, 1, 1, 2))):
        pose: people.Pose = f.rng.choice(("standing", "walking", "waving"))
        scale = f.rng.uniform(0.9, 1.04)

        def build(frame: Frame, pose: people.Pose = pose, scale: float = scale) -> None:
            people.person(f.kit, frame.at(0, 0, scale=scale), pose)

        if stand := f.in_the_open(build, 0.28, 0.3, 1.75, spread=0.8):
            f.sights += [(stand.x, stand.y, 1.1)] * 2
