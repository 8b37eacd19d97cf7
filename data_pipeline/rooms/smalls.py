"""Small things: what stands on tops and shelves, and what hangs on walls and ceilings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.rooms import toys
from data_pipeline.rooms.furniture import LAMPLIGHT, laptop
from data_pipeline.rooms.kit import Kit, Maker, Top
from data_pipeline.rooms.scene import Frame


def vase(kit: Kit, frame: Frame) -> None:
    """A bellied vase."""
    piece, glaze, r = kit.thing("vase", frame), kit.accent(), kit.between(0.06, 0.1)
    piece.ball((0, 0, r * 1.2), (r, r, r * 1.2), glaze)
    piece.cone((0, 0, r * 2.5), r * 0.4, r * 0.7, r * 0.45, glaze)


def bottle(kit: Kit, frame: Frame) -> None:
    """A bottle with shoulder, neck and label."""
    piece, r, h = kit.thing("bottle", frame), kit.between(0.035, 0.05), kit.between(0.08, 0.12)
    glass = kit.material(kit.rng.choice((kit.palette.leaf(), kit.palette.accent(), kit.palette.hair())), gloss=0.8)
    piece.cylinder((0, 0, h), r, h, glass)
    piece.cone((0, 0, 2 * h + 0.03), r, r * 0.36, 0.03, glass)
    piece.cylinder((0, 0, 2 * h + 0.1), r * 0.36, 0.04, glass)
    piece.cylinder((0, 0, h), r * 1.03, h * 0.4, kit.white())


def bottles(kit: Kit, frame: Frame) -> None:
    """A few bottles."""
    for k in range(kit.rng.choice((1, 2, 3))):
        bottle(kit, frame.at(0.11 * (k - 1), 0.03 * (k % 2)))


def bowl_of_fruit(kit: Kit, frame: Frame) -> None:
    """A bowl with oranges or apples."""
    bowl, glaze = kit.thing("bowl", frame), kit.accent()
    bowl.cone((0, 0, 0.04), 0.06, 0.14, 0.04, glaze)
    bowl.ring((0, 0, 0.08), 0.135, 0.01, glaze)
    fruit, skin = kit.thing("fruit", frame), kit.toy()
    for k in range(3):
        fruit.ball((0.06 * math.cos(2.1 * k), 0.06 * math.sin(2.1 * k), 0.11), (0.05, 0.05, 0.05), skin)


def cup(kit: Kit, frame: Frame) -> None:
    """A cup with a handle."""
    piece, glaze = kit.thing("cup", frame), kit.accent()
    piece.cone((0, 0, 0.055), 0.035, 0.05, 0.055, glaze)
    piece.ring((0.06, 0, 0.055), 0.03, 0.01, glaze, axis="y")


def plate(kit: Kit, frame: Frame) -> None:
    """A plate."""
    piece, china = kit.thing("plate", frame), kit.white()
    piece.cone((0, 0, 0.01), 0.07, 0.12, 0.01, china)
    piece.ring((0, 0, 0.02), 0.115, 0.007, kit.accent())


def books(kit: Kit, frame: Frame) -> None:
    """A pile of books lying flat."""
    for k in range(kit.rng.choice((1, 2, 3))):
        cover = kit.material(kit.palette.accent(), ("plain", "stripes"))
        piece = kit.thing("book", frame.at(0, 0, 0.042 * k, turn=kit.between(-0.3, 0.3)))
        piece.box((0, 0, 0.02), (0.12, 0.085, 0.02), cover)


def ball(kit: Kit, frame: Frame) -> None:
    """A ball."""
    r = kit.between(0.06, 0.13)
    skin = kit.material(kit.palette.toy(), ("stripes", "dots", "checker", "plain"), gloss=0.4)
    kit.thing("ball", frame).ball((0, 0, r), (r, r, r), skin)


def plant(kit: Kit, frame: Frame) -> None:
    """A leafy plant in a pot; the frame's scale sets its size (1: about half a metre tall)."""
    piece, leaf = kit.thing("plant", frame), kit.material(kit.palette.leaf(), gloss=0.15)
    clay = kit.material(kit.palette.accent() if kit.rng.random() < 0.5 else kit.palette.wood(), gloss=0.15)
    piece.cone((0, 0, 0.08), 0.06, 0.09, 0.08, clay)
    piece.ring((0, 0, 0.16), 0.085, 0.012, clay)
    for k in range(11):
        angle, lean, tall = 2.4 * k, kit.between(0.04, 0.16), kit.between(0.28, 0.5)
        x, y = math.cos(angle), math.sin(angle)
        tip = (x * lean, y * lean, tall)
        piece.limb((x * 0.02, y * 0.02, 0.14), tip, 0.01, 0.006, leaf)
        piece.ball(tip, (0.085, 0.035, 0.06), leaf, turn=angle)


def table_lamp(kit: Kit, frame: Frame) -> None:
    """A lamp that is on."""
    piece = kit.thing("table_lamp", frame)
    piece.ball((0, 0, 0.08), (0.06, 0.06, 0.08), kit.accent())
    piece.cylinder((0, 0, 0.2), 0.012, 0.06, kit.metal())
    piece.cone((0, 0, 0.31), 0.13, 0.08, 0.08, kit.shine(LAMPLIGHT, 0.7))


def teddy(kit: Kit, frame: Frame) -> None:
    """A teddy bear that sits facing -y, 0.36 tall at scale 1."""
    piece, fur = kit.thing("teddy", frame), kit.material(kit.palette.fur(), "fabric", gloss=0.0)
    piece.ball((0, 0, 0.11), (0.1, 0.09, 0.11), fur)
    piece.ball((0, -0.01, 0.265), (0.08, 0.075, 0.075), fur)
    piece.ball((0, -0.075, 0.25), (0.035, 0.03, 0.028), kit.material(kit.palette.skin()))
    for i in (-1, 1):
        piece.ball((i * 0.06, 0, 0.33), (0.03, 0.018, 0.03), fur)
        piece.limb((i * 0.08, -0.02, 0.18), (i * 0.14, -0.07, 0.11), 0.04, 0.034, fur)
        piece.limb((i * 0.05, -0.03, 0.05), (i * 0.08, -0.15, 0.045), 0.048, 0.044, fur)


def carton(kit: Kit, frame: Frame) -> None:
    """A small box."""
    x, y, z = kit.between(0.06, 0.13), kit.between(0.06, 0.1), kit.between(0.05, 0.1)
    kit.thing("carton", frame).box((0, 0, z), (x, y, z), kit.accent())


def picture(kit: Kit, frame: Frame, half_x: float, half_z: float) -> None:
    """A framed picture; the frame's origin is on the wall at its middle."""
    piece, wood = kit.thing("picture", frame), kit.wood()
    piece.box(
        (0, 0, 0),
        (half_x, 0.003, half_z),
        kit.material((kit.palette.accent()[0], kit.rng.choice((kit.palette.leaf(), kit.palette.toy()))[0]), "picture"),
    )
    for i in (-1, 1):
        piece.box((i * half_x, 0, 0), (0.02, 0.007, half_z + 0.02), wood)
        piece.box((0, 0, i * half_z), (half_x, 0.0065, 0.02), wood)


def wall_clock(kit: Kit, frame: Frame) -> None:
    """A wall clock of radius 0.17."""
    piece, dark = kit.thing("clock", frame), kit.dark()
    piece.cylinder((0, -0.015, 0), 0.15, 0.015, kit.white(), axis="y")
    piece.ring((0, -0.02, 0), 0.15, 0.018, kit.accent(), axis="y")
    piece.limb((0, -0.035, 0), (0, -0.035, 0.11), 0.007, 0.006, dark)
    piece.limb((0, -0.035, 0), (0.07, -0.035, 0.03), 0.008, 0.007, dark)


def ceiling_lamp(kit: Kit, frame: Frame) -> None:
    """A pendant lamp; the frame's origin is on the ceiling."""
    piece = kit.thing("ceiling_lamp", frame)
    piece.cylinder((0, 0, -0.1), 0.008, 0.1, kit.dark())
    shade = kit.shine(LAMPLIGHT, 1.0)
    if kit.rng.random() < 0.5:
        piece.ball((0, 0, -0.26), (0.14, 0.14, 0.11), shade)
    else:
        piece.cone((0, 0, -0.25), 0.2, 0.1, 0.08, shade)


def guitar(kit: Kit, frame: Frame) -> None:
    """A guitar leaning against something behind it; 0.2 x 0.15 in half size, 1 m tall."""
    piece, wood, neck = kit.thing("guitar", frame), kit.wood(), kit.dark()
    piece.ball((0, -0.06, 0.2), (0.19, 0.05, 0.19), wood)
    piece.ball((0, -0.04, 0.42), (0.14, 0.05, 0.15), wood)
    piece.ball((0, -0.105, 0.28), (0.045, 0.01, 0.045), neck)
    piece.limb((0, -0.05, 0.45), (0, 0.05, 0.98), 0.026, 0.02, neck)
    piece.box((0, 0.06, 1.02), (0.04, 0.015, 0.07), wood)


def umbrella(kit: Kit, frame: Frame) -> None:
    """An umbrella standing in a corner or stand, 0.06 in half size."""
    piece = kit.thing("umbrella", frame)
    piece.cone((0, 0, 0.38), 0.015, 0.055, 0.36, kit.accent())
    piece.limb((0, 0, 0.72), (0, 0, 0.9), 0.012, 0.012, kit.wood())
    piece.ring((0.035, 0, 0.9), 0.035, 0.011, kit.wood(), axis="y")


def blocks(kit: Kit, frame: Frame) -> None:
    """A pile of toy blocks."""
    piece = kit.thing("blocks", frame)
    for k, (x, y, z) in enumerate(((-0.11, 0, 0), (0.11, 0.02, 0), (0.0, -0.02, 1), (0.0, -0.02, 2))):
        turn = kit.between(-0.4, 0.4) if k else 0.2
        if k == 3:
            piece.cone((x, y, 0.06 + 0.12 * z), 0.07, 0.005, 0.06, kit.toy())
        else:
            piece.box((x, y, 0.06 + 0.12 * z), (0.06, 0.06, 0.0595), kit.toy(), turn=turn)


def ring_tower(kit: Kit, frame: Frame) -> None:
    """A toy: rings on a pole."""
    piece = kit.thing("blocks", frame)
    for k in range(5):
        piece.ring((0, 0, 0.03 + 0.055 * k), 0.095 - 0.012 * k, 0.028, kit.toy())
    piece.ball((0, 0, 0.31), (0.035, 0.035, 0.035), kit.toy())


class Item(NamedTuple):
    """A small thing: its builder, and the half sizes and height that hold it at scale 1, metres."""

    make: Maker
    half_x: float
    half_y: float
    height: float


PLANT = Item(plant, 0.25, 0.25, 0.56)
TEDDY = Item(teddy, 0.18, 0.2, 0.37)
BALL = Item(ball, 0.13, 0.13, 0.26)
MOTORBIKE = Item(toys.motorbike, 0.24, 0.1, 0.28)
_VASE = Item(vase, 0.1, 0.1, 0.3)
_BOTTLES = Item(bottles, 0.17, 0.09, 0.4)
_FRUIT = Item(bowl_of_fruit, 0.15, 0.15, 0.17)
_CUP = Item(cup, 0.1, 0.06, 0.12)
_BOOKS = Item(books, 0.15, 0.13, 0.13)
_LAMP = Item(table_lamp, 0.13, 0.13, 0.4)

HOUSEHOLD = (_VASE, _BOTTLES, _FRUIT, _CUP, _BOOKS, PLANT, _LAMP, Item(carton, 0.13, 0.1, 0.2), TEDDY)
KITCHEN = (_BOTTLES, _FRUIT, _CUP, Item(plate, 0.13, 0.13, 0.04), _VASE)
DESK = (_BOOKS, _CUP, _LAMP, PLANT, Item(bottle, 0.06, 0.06, 0.4), Item(laptop, 0.18, 0.2, 0.23))
MODELS = (
    Item(toys.car, 0.27, 0.12, 0.21),
    Item(toys.bus, 0.31, 0.11, 0.26),
    Item(toys.train, 0.42, 0.1, 0.27),
    MOTORBIKE,
    Item(toys.aeroplane, 0.32, 0.23, 0.26),
    Item(toys.boat, 0.28, 0.08, 0.47),
    Item(toys.cow, 0.28, 0.1, 0.32),
    Item(toys.horse, 0.3, 0.07, 0.41),
    Item(toys.sheep, 0.22, 0.12, 0.26),
    Item(toys.bird, 0.14, 0.07, 0.28),
)
TOYS = (*MODELS, TEDDY, BALL, Item(blocks, 0.2, 0.1, 0.36), Item(ring_tower, 0.13, 0.13, 0.35))
DISPLAY = (_VASE, _BOTTLES, _FRUIT, _BOOKS, *MODELS)
PETS = (Item(toys.dog, 0.36, 0.09, 0.45), Item(toys.cat, 0.17, 0.16, 0.37))
_SMALLEST_SCALE = 0.6


def fill_top(kit: Kit, top: Top, menu: Sequence[Item], share: float) -> None:
    """Stand things side by side on a top, each in a slot of its own; what is too big for the top is scaled down a
    little or left out."""
    x = -top.half_x
    while x < top.half_x - 0.1:
        item = kit.rng.choice(menu)
        turn = kit.between(-0.5, 0.5)
        half_x, half_y = _turned(item, turn)
        scale = min(1.0, top.clearance / item.height, top.half_y / half_y)
        if scale < _SMALLEST_SCALE or x + 2 * scale * half_x > top.half_x:
            x += 0.1
            continue
        if kit.rng.random() < share:
            spare = top.half_y - scale * half_y
            item.make(kit, top.frame.at(x + scale * half_x, kit.between(-spare, spare), turn=turn, scale=scale))
        x += 2 * scale * half_x + kit.between(0.03, 0.15)


def _turned(item: Item, turn: float) -> tuple[float, float]:
    """Half sizes of the rectangle that holds a turned thing."""
    cos, sin = math.cos(turn), abs(math.sin(turn))
    return item.half_x * cos + item.half_y * sin, item.half_x * sin + item.half_y * cos
