"""The room itself: faces, skirting, doors, windows with frames and panes, curtains, rugs, pictures.

What lies flat on a wall or floor stands out by millimetres only: the sides of deeper ledges would be narrower than a
pixel and dot the labels with odd normals.
"""

from random import Random

from data_pipeline.rooms import smalls
from data_pipeline.rooms.kit import Kit
from data_pipeline.rooms.layout import FloorPlan
from data_pipeline.rooms.palette import Palette
from data_pipeline.rooms.scene import Frame, Material, Scene

_FLOORS: dict[str, tuple[str, ...]] = {
    "bathroom": ("tiles", "checker", "marble"),
    "kitchen": ("tiles", "checker", "wood"),
    "bedroom": ("wood", "fabric"),
    "office": ("fabric", "wood"),
    "storage_room": ("plain", "marble"),
    "playroom": ("wood", "fabric", "checker"),
}
_WALLS: dict[str, tuple[str, ...]] = {
    "bathroom": ("tiles", "tiles", "plain"),
    "kitchen": ("plain", "tiles"),
    "playroom": ("dots", "stripes", "plain"),
    "storage_room": ("brick", "plain"),
    "library": ("panel", "plain"),
}


def empty_room(kit_rng: Random, palette: Palette, scene_type: str, plan: FloorPlan) -> Kit:
    """The faces and skirting of a room of a type, as the start of a kit."""
    rng = kit_rng

    def face(colours: str, textures: tuple[str, ...], period: float, gloss: float) -> Material:
        texture = rng.choice(textures)
        pair = palette.wood() if texture == "wood" else palette.stone() if colours == "stone" else palette.wall()
        return Material(
            texture=texture, ground=pair[0], figure=pair[1], period=period, gloss=gloss, seed=rng.randrange(32)
        )

    floor = face("stone", _FLOORS.get(scene_type, ("wood", "wood", "tiles", "fabric")), rng.uniform(0.14, 0.4), 0.2)
    textures = _WALLS.get(scene_type, ("plain", "plain", "stripes", "brick", "panel", "plain"))
    wall = face("wall", textures, rng.uniform(0.14, 0.4), 0.03)
    feature = face("stone", textures, rng.uniform(0.14, 0.4), 0.03) if rng.random() < 0.35 else wall
    ceiling = face("wall", ("plain",), 0.3, 0.0)
    faces = (wall, wall, wall, feature, floor, ceiling)
    kit = Kit(Scene(plan.half_width, plan.half_depth, plan.height, faces), rng, palette)
    if scene_type not in ("bathroom", "storage_room"):
        skirting = kit.thing("wall", Frame(0, 0))
        paint = kit.paint()
        w, d = plan.half_width, plan.half_depth
        for side in (-1, 1):
            skirting.box((side * w, 0, 0.04), (0.002, d, 0.04), paint)
            skirting.box((0, side * d, 0.04), (w, 0.002, 0.0395), paint)
    return kit


def door(kit: Kit, plan: FloorPlan) -> None:
    """A door with its frame; the floor before it stays free."""
    spot = plan.on_wall(0.48, 0.0, 2.08, depth=0.08)
    if spot is None:
        return
    frame = spot.at(0, 0, -1.04)
    plan.reserve(frame.at(0, -0.45), 0.45, 0.35, 2.0)
    piece, leaf, paint = kit.thing("door", frame), kit.lacquer(), kit.paint()
    piece.box((0, 0, 1.0), (0.4, 0.003, 1.0), leaf)
    for side in (-1, 1):
        piece.box((side * 0.435, 0, 1.02), (0.04, 0.008, 1.02), paint)
        piece.box((0, 0, 1.0 + side * 0.48), (0.28, 0.006, 0.38), leaf)
    piece.box((0, 0, 2.04), (0.4, 0.0075, 0.04), paint)
    piece.limb((0.33, -0.06, 1.0), (0.24, -0.06, 1.0), 0.014, 0.012, kit.metal())
    piece.limb((0.33, 0, 1.0), (0.33, -0.06, 1.0), 0.012, 0.012, kit.metal())


def window(kit: Kit, plan: FloorPlan) -> Frame | None:
    """A window: frame, mullions, panes of glass, perhaps curtains. Returns the frame of its middle; None if no wall is
    free."""
    half_x, half_z = kit.between(0.35, 0.75), kit.between(0.4, 0.6)
    sill = kit.between(0.8, 1.0)
    curtains = kit.rng.random() < 0.5
    beside, below = (0.28, 0.32) if curtains else (0.06, 0.05)
    low, high = sill - below, sill + 2 * half_z + 0.15
    spot = plan.on_wall(half_x + beside, low, high, depth=0.16 if curtains else 0.12)
    if spot is None:
        return None
    frame = spot.at(0, 0, sill + half_z - (low + high) / 2)
    piece, paint = kit.thing("window", frame), kit.paint()
    for side in (-1, 1):
        piece.box((side * half_x, 0, 0), (0.035, 0.01, half_z + 0.035), paint)
        piece.box((0, 0, side * half_z), (half_x, 0.0095, 0.035), paint)
    piece.box((0, 0, 0), (0.02, 0.007, half_z), paint)
    sill_depth = 0.02 if curtains else 0.06
    piece.box((0, -sill_depth, -half_z - 0.03), (half_x + 0.06, sill_depth, 0.015), paint)
    panes = kit.thing("window", frame)
    view = kit.material(kit.palette.white(), "sky", gloss=0.0, glow=0.95)
    rows = kit.rng.choice((1, 2))
    if rows == 2:
        piece.box((0, 0, 0), (half_x, 0.0065, 0.02), paint)
    panes.box((0, 0, 0), (half_x - 0.03, 0.003, half_z - 0.03), view)
    if curtains:
        cloth = kit.cloth()
        for side in (-1, 1):
            curtain = kit.thing("curtain", frame)
            for k in range(3):
                x = side * (half_x + 0.02 + 0.085 * k)
                curtain.limb((x, -0.1, half_z + 0.05), (x, -0.1, -half_z - 0.25), 0.045, 0.055, cloth)
        rail = kit.thing("curtain", frame)
        rail.limb((-half_x - 0.26, -0.1, half_z + 0.1), (half_x + 0.26, -0.1, half_z + 0.1), 0.014, 0.014, kit.wood())
    return frame


def pictures(kit: Kit, plan: FloorPlan, count: int) -> None:
    """Pictures, and perhaps a clock, where walls are free."""
    for _ in range(count):
        half_x, half_z = kit.between(0.16, 0.45), kit.between(0.14, 0.32)
        middle = kit.between(1.5, 1.75)
        if spot := plan.on_wall(half_x, middle - half_z, middle + half_z, depth=0.03):
            smalls.picture(kit, spot, half_x, half_z)
    if kit.rng.random() < 0.5 and (spot := plan.on_wall(0.17, 1.7, 2.04, depth=0.05)):
        smalls.wall_clock(kit, spot)


def rug(kit: Kit, plan: FloorPlan) -> None:
    """A rug in the middle, rectangular or round."""
    pile = kit.material(kit.palette.cloth(), ("carpet", "stripes", "fabric", "checker"), gloss=0.0)
    piece = kit.thing("rug", Frame(kit.between(-0.2, 0.2), kit.between(-0.3, 0.3)))
    if kit.rng.random() < 0.3:
        piece.cylinder((0, 0, 0), min(plan.half_width * 0.65, kit.between(0.8, 1.2)), 0.001, pile)
    else:
        size = (plan.half_width * kit.between(0.4, 0.65), plan.half_depth * kit.between(0.4, 0.65), 0.001)
        piece.box((0, 0, 0), size, pile)
