"""Ten kinds of rooms, each with the furniture by which one knows it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from data_pipeline.rooms import appliances, building, furniture, people, smalls, toys
from data_pipeline.rooms.furnisher import Furnisher
from data_pipeline.rooms.layout import FloorPlan
from data_pipeline.rooms.palette import Palette
from data_pipeline.rooms.scene import Frame, Point, Scene


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


def furnish(rng: Random) -> Room:
    """A room of a random type, furnished."""
    scene_type = rng.choice(tuple(_TYPES))
    kind = _TYPES[scene_type]
    plan = FloorPlan(rng.uniform(*kind.half_width), rng.uniform(*kind.half_depth), rng.uniform(2.35, 2.9), rng)
    kit = building.empty_room(rng, Palette(rng), scene_type, plan)
    furnisher = Furnisher(kit, plan)
    if rng.random() < 0.7:
        building.door(kit, plan)
    windows = [building.window(kit, plan) for _ in range(rng.choice(kind.windows))]
    kind.build(furnisher)
    if kind.cosy:
        _extras(furnisher)
    _people(furnisher)
    for top in kit.tops:
        smalls.fill_top(kit, top, kind.menu, 0.65)
    if scene_type != "storage_room":
        building.pictures(kit, plan, rng.choice((1, 2, 3)))
    if kind.cosy and rng.random() < 0.55:
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


def _daylight(windows: Sequence[Frame | None]) -> Point | None:
    first = next((window for window in windows if window), None)
    return first.point((0, -0.25, 0.1)) if first else None


def _bedroom(f: Furnisher) -> None:
    half_x = f.rng.uniform(0.5, 0.85)
    bed = f.along_wall(partial(furniture.bed, half_x=half_x), half_x, 1.04, 1.0)
    if bed:
        nightstand = partial(furniture.cabinet, cls="nightstand", half_x=0.22, half_y=0.2, height=0.5)
        for side in (-1, 1):
            f.at(nightstand, bed.at(side * (half_x + 0.27), 0.82), 0.22, 0.2, 0.5)
    f.cabinet("wardrobe", f.rng.uniform(0.45, 0.75), 0.3, f.rng.uniform(1.75, 2.1), sight=True)
    f.cabinet("cabinet", f.rng.uniform(0.35, 0.55), 0.22, f.rng.uniform(0.7, 0.9))
    if f.rng.random() < 0.5:
        _toys(f, 2)


def _living_room(f: Furnisher) -> None:
    f.sofa("sofa", f.rng.uniform(0.85, 1.1))
    half_x = f.rng.uniform(0.65, 0.85)
    f.along_wall(partial(furniture.tv_bench, half_x=half_x), half_x, 0.2, 1.25)
    f.sofa("armchair", 0.44)
    half_y = f.rng.uniform(0.3, 0.42)
    coffee_table = partial(furniture.table, cls="coffee_table", half_x=0.5, half_y=half_y, height=0.42)
    f.in_the_open(coffee_table, 0.5, half_y, 0.42, spread=0.35, yaw=0.0, sight=True)
    if f.rng.random() < 0.4:
        f.shelf(books=0.5, sight=False)
    if f.rng.random() < 0.3:
        _toys(f, 2)


def _kitchen(f: Furnisher) -> None:
    f.along_wall(appliances.stove, 0.3, 0.3, 0.9)
    f.along_wall(appliances.kitchen_sink, 0.4, 0.3, 1.16)
    height = f.rng.uniform(1.5, 1.85)
    f.along_wall(partial(appliances.fridge, height=height), 0.32, 0.32, height)
    for _ in range(3):
        half_x = f.rng.uniform(0.3, 0.5)
        counter = f.along_wall(partial(appliances.counter, half_x=half_x), half_x, 0.3, 0.9, sight=False)
        if counter and f.rng.random() < 0.3:
            f.kit.tops.pop()  # the worktop is taken
            appliances.microwave(f.kit, counter.at(0, 0.05, 0.9))
        if spot := f.plan.on_wall(half_x, 1.4, 2.0, depth=0.35, margin=0.01):
            appliances.wall_cupboard(f.kit, spot, half_x, 0.3)
    if f.rng.random() < 0.6:
        f.table_with_chairs("dining_table", chairs=f.rng.choice((2, 3, 4)))


def _bathroom(f: Furnisher) -> None:
    f.along_wall(appliances.bathtub, 0.8, 0.38, 0.75)
    f.along_wall(appliances.toilet, 0.24, 0.36, 0.8)
    f.along_wall(appliances.washbasin, 0.28, 0.25, 1.05)
    if f.rng.random() < 0.5:
        f.along_wall(appliances.washer, 0.3, 0.3, 0.86)
    for _ in range(2):
        if spot := f.plan.on_wall(0.28, 1.0, 1.6, depth=0.09):
            appliances.towel(f.kit, spot)
    if f.rng.random() < 0.7:
        f.cabinet("cabinet", 0.26, 0.16, f.rng.uniform(0.6, 0.9))


def _office(f: Furnisher) -> None:
    for _ in range(2):
        half_x = f.rng.uniform(0.6, 0.75)
        desk = f.along_wall(partial(furniture.workplace, half_x=half_x), half_x, 0.36, 1.25)
        if desk:
            place = desk.at(f.rng.uniform(-0.15, 0.15), -0.66, turn=math.pi + f.rng.uniform(-0.1, 0.1))
            f.at(furniture.chair, place, 0.22, 0.22, 0.9)
    f.shelf(books=0.8)
    height = f.rng.choice((0.7, 1.05, 1.35))
    f.along_wall(partial(appliances.file_cabinet, height=height), 0.24, 0.3, height)
    f.on_floor(smalls.Item(appliances.paper_bin, 0.16, 0.16, 0.38))


def _dining_room(f: Furnisher) -> None:
    f.table_with_chairs("dining_table", chairs=f.rng.choice((4, 5, 6)), spread=0.15)
    f.cabinet("cabinet", f.rng.uniform(0.5, 0.75), 0.22, f.rng.uniform(0.8, 1.0), sight=True)
    f.cabinet("cabinet", f.rng.uniform(0.4, 0.5), 0.2, f.rng.uniform(1.6, 2.0))


def _corridor(f: Furnisher) -> None:
    for _ in range(2):
        building.door(f.kit, f.plan)
    f.cabinet("cabinet", f.rng.uniform(0.35, 0.5), 0.15, f.rng.uniform(0.75, 0.95), sight=True)
    if f.rng.random() < 0.5:
        f.along_wall(toys.bicycle, 0.88, 0.25, 1.0)
    if f.rng.random() < 0.6:
        f.cabinet("wardrobe", f.rng.uniform(0.3, 0.45), 0.16, f.rng.uniform(1.75, 2.1))
    f.along_wall(smalls.umbrella, 0.08, 0.08, 0.95, sight=False)


def _playroom(f: Furnisher) -> None:
    low_table = partial(furniture.table, cls="coffee_table", half_x=0.45, half_y=0.45, height=0.45)
    table = f.in_the_open(low_table, 0.45, 0.45, 0.45, spread=0.3, sight=True)
    if table:
        for side in (-1, 1):
            f.at(furniture.stool, table.at(side * 0.66, 0), 0.18, 0.18, 0.5)
    f.shelf(books=0.25)
    f.cabinet("cabinet", f.rng.uniform(0.45, 0.7), 0.22, f.rng.uniform(0.5, 0.75), sight=True)
    _toys(f, 6)
    f.on_floor(smalls.TEDDY, f.rng.uniform(1.6, 2.4))


def _storage_room(f: Furnisher) -> None:
    f.shelf(books=0.1)
    if f.rng.random() < 0.6:
        f.along_wall(toys.bicycle, 0.88, 0.25, 1.0)
    if f.rng.random() < 0.5:
        f.on_floor(smalls.MOTORBIKE, f.rng.uniform(2.2, 3.0), sight=True)
    for _ in range(7):
        half = f.rng.uniform(0.22, 0.36)
        f.in_the_open(partial(appliances.cartons, half=half), half, half, 0.9, sight=f.rng.random() < 0.4)
    for _ in range(2):
        f.on_floor(smalls.Item(appliances.barrel, 0.28, 0.28, 0.82))


def _library(f: Furnisher) -> None:
    for _ in range(5):
        f.shelf(books=0.85)
    if f.rng.random() < 0.5:
        f.table_with_chairs("desk", chairs=2)
    else:
        f.sofa("armchair", 0.44)


def _toys(f: Furnisher, count: int) -> None:
    """Large toys on the floor."""
    for item in f.rng.sample(smalls.TOYS, count):
        f.on_floor(item, f.rng.uniform(1.3, 2.2), sight=True)


def _extras(f: Furnisher) -> None:
    """Things that may stand in rooms of several types: plants, a lamp, a guitar, pets."""
    rng = f.rng
    if rng.random() < 0.5:
        f.on_floor(smalls.PLANT, rng.uniform(1.2, 2.1))
    if rng.random() < 0.3:
        f.along_wall(furniture.floor_lamp, 0.2, 0.2, 1.75, sight=False)
    if rng.random() < 0.12:
        f.along_wall(smalls.guitar, 0.2, 0.15, 1.1, sight=False)
    if rng.random() < 0.4:
        f.on_floor(rng.choice(smalls.PETS), rng.uniform(1.15, 1.6), sight=True)
    if rng.random() < 0.15:
        f.on_floor(smalls.BALL, 1.2)


def _people(f: Furnisher) -> None:
    """Half of the rooms have one or two people, standing about or sitting on a sofa."""
    if f.rng.random() < 0.4:
        return
    if f.seats and f.rng.random() < 0.5:
        seat = f.rng.choice(f.seats)
        people.person(f.kit, seat, "sitting")
        f.sights.append((seat.x, seat.y, 0.9))
    for _ in range(f.rng.choice((1, 1, 2)) if not f.seats else f.rng.choice((0, 1))):
        pose: people.Pose = f.rng.choice(("standing", "walking", "waving"))
        make = partial(people.person, pose=pose)
        stand = f.in_the_open(make, *people.HALF_SIZES[pose], 1.8, spread=0.8, sight=True)
        if stand:
            f.sights.append((stand.x, stand.y, 1.1))


@dataclass(frozen=True)
class _SceneType:
    """How a type of room is made.

    Attributes:
        build: places its furniture.
        menu: what stands on its tops.
        half_width, half_depth: ranges of its half sizes, metres.
        windows: numbers of windows to draw from.
        cosy: may have plants, pets, rugs.
    """

    build: Callable[[Furnisher], None]
    menu: tuple[smalls.Item, ...]
    half_width: tuple[float, float] = (1.7, 2.5)
    half_depth: tuple[float, float] = (1.8, 2.7)
    windows: tuple[int, ...] = (0, 1, 1, 2)
    cosy: bool = True


_TYPES: dict[str, _SceneType] = {
    "bathroom": _SceneType(
        _bathroom, smalls.KITCHEN, half_width=(1.25, 1.7), half_depth=(1.4, 1.9), windows=(0, 1), cosy=False
    ),
    "bedroom": _SceneType(_bedroom, smalls.HOUSEHOLD),
    "corridor": _SceneType(_corridor, smalls.HOUSEHOLD, half_width=(0.85, 1.15), half_depth=(2.6, 3.6), windows=(0,)),
    "dining_room": _SceneType(_dining_room, smalls.KITCHEN),
    "kitchen": _SceneType(_kitchen, smalls.KITCHEN),
    "library": _SceneType(_library, smalls.DISPLAY),
    "living_room": _SceneType(_living_room, smalls.DISPLAY),
    "office": _SceneType(_office, smalls.DESK),
    "playroom": _SceneType(_playroom, smalls.TOYS),
    "storage_room": _SceneType(_storage_room, smalls.DISPLAY, cosy=False),
}
