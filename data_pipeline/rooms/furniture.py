"""Furniture. Every builder stands its piece in a frame with its back to +y, fills the given half sizes and no more, and
registers the tops that small things may stand on."""

from data_pipeline.rooms.kit import Kit, Top
from data_pipeline.rooms.scene import Frame

LAMPLIGHT = (1.0, 0.9, 0.72)


def table(kit: Kit, frame: Frame, cls: str, half_x: float, half_y: float, height: float) -> None:
    """A table or desk on four legs; the square ones may be round, on one leg."""
    piece, wood = kit.thing(cls, frame), kit.wood() if kit.rng.random() < 0.75 else kit.lacquer()
    if half_x == half_y:
        piece.cylinder((0, 0, height - 0.02), half_x, 0.02, wood)
        piece.cylinder((0, 0, height / 2 - 0.01), 0.05, height / 2 - 0.03, wood)
        piece.cone((0, 0, 0.03), half_x * 0.55, 0.06, 0.03, wood)
        kit.tops.append(Top(frame.at(0, 0, height), half_x * 0.7, half_y * 0.7))
        return
    piece.box((0, 0, height - 0.02), (half_x, half_y, 0.02), wood)
    leg, round_legs = kit.between(0.022, 0.04), kit.rng.random() < 0.5
    for i in (-1, 1):
        for j in (-1, 1):
            x, y, z = i * (half_x - leg - 0.02), j * (half_y - leg - 0.02), height / 2 - 0.02
            if round_legs:
                piece.cone((x, y, z), leg * 0.7, leg, z, wood)
            else:
                piece.box((x, y, z), (leg, leg, z), wood)
    kit.tops.append(Top(frame.at(0, 0, height), half_x * 0.9, half_y * 0.85))


def chair(kit: Kit, frame: Frame, half: float = 0.22) -> None:
    """A chair with a back; it faces -y. Fills 2 half x 2 half."""
    piece, frame_material, seat = kit.thing("chair", frame), kit.wood(), kit.cloth()
    height = 0.45
    piece.rounded((0, 0, height), (half, half, 0.035), 0.03, seat)
    for i in (-1, 1):
        x = i * (half - 0.025)
        piece.limb((x, 0.025 - half, 0.02), (x, 0.025 - half, height), 0.016, 0.02, frame_material)
        piece.limb((x, half - 0.025, 0.02), (x, half - 0.025, 0.88), 0.016, 0.02, frame_material)
    piece.rounded((0, half - 0.03, 0.76), (half - 0.02, 0.022, 0.13), 0.02, seat)


def stool(kit: Kit, frame: Frame, half: float = 0.18) -> None:
    """A round stool on three legs."""
    piece, wood = kit.thing("stool", frame), kit.wood()
    height = kit.between(0.4, 0.6)
    piece.cylinder((0, 0, height), half, 0.025, kit.accent())
    for x, y in ((0, -0.7), (0.6, 0.4), (-0.6, 0.4)):
        piece.limb((x * half, y * half, 0.02), (x * half * 0.7, y * half * 0.7, height), 0.018, 0.018, wood)


def sofa(kit: Kit, frame: Frame, cls: str, half_x: float, half_y: float) -> None:
    """A sofa or armchair with loose cushions."""
    piece, cloth, feet = kit.thing(cls, frame), kit.cloth(), kit.wood()
    piece.rounded((0, 0, 0.24), (half_x - 0.06, half_y - 0.02, 0.18), 0.05, cloth)
    piece.rounded((0, half_y - 0.11, 0.56), (half_x - 0.08, 0.1, 0.28), 0.07, cloth)
    for i in (-1, 1):
        piece.rounded((i * (half_x - 0.09), 0, 0.36), (0.09, half_y, 0.26), 0.06, cloth)
        piece.cylinder((i * (half_x - 0.1), 0.08 - half_y, 0.04), 0.025, 0.04, feet)
    cushions = 1 if cls == "armchair" else kit.rng.choice((2, 3))
    for k in range(cushions):
        x = (k - (cushions - 1) / 2) * 1.1 * half_x / cushions
        pillow(kit, frame.at(x, half_y - 0.28, 0.42), 0.19)


def pillow(kit: Kit, frame: Frame, half: float) -> None:
    """A cushion leaning back."""
    kit.thing("pillow", frame).ball((0, 0, half * 0.85), (half, half * 0.45, half * 0.85), kit.cloth())


def bed(kit: Kit, frame: Frame, half_x: float) -> None:
    """A bed of half length 1.03 with its head at +y, bedding and pillows."""
    piece, wood, sheet, cover = kit.thing("bed", frame), kit.wood(), kit.material(kit.palette.white()), kit.cloth()
    piece.box((0, 0, 0.17), (half_x, 1.0, 0.1), wood)
    piece.box((0, 1.0, 0.5), (half_x, 0.03, 0.5), wood)
    piece.rounded((0, 0, 0.36), (half_x - 0.02, 0.97, 0.12), 0.06, sheet)
    piece.rounded((0, -0.3, 0.38), (half_x, 0.7, 0.13), 0.07, cover)
    for x in (-0.46, 0.46) if half_x > 0.7 else (0.0,):
        soft = kit.material(kit.palette.white(), "plain", gloss=0.02)
        size = (0.3, 0.19, 0.1)
        kit.thing("pillow", frame).ball((x * half_x, 0.72, 0.55), size, soft if kit.rng.random() < 0.6 else kit.cloth())


def cabinet(kit: Kit, frame: Frame, cls: str, half_x: float, half_y: float, height: float) -> None:
    """A closed cabinet: doors with knobs, or drawers when low."""
    piece, body, knob = kit.thing(cls, frame), kit.lacquer(), kit.metal()
    piece.box((0, 0.0015, height / 2), (half_x, half_y - 0.0015, height / 2), body)
    front, gap = kit.material((body.ground, body.figure), body.texture, gloss=body.gloss), 0.004
    if height < 1.0 and kit.rng.random() < 0.5:
        drawers = max(2, round(height / 0.28))
        for k in range(drawers):
            half = height / drawers / 2
            piece.box((0, 0.003 - half_y, (2 * k + 1) * half), (half_x - gap, 0.003, half - gap), front)
            piece.ball((0, -half_y, (2 * k + 1) * half), (0.05, 0.016, 0.012), knob)
    else:
        for i in (-1, 1):
            x = i * half_x / 2
            piece.box((x, 0.003 - half_y, height / 2), (half_x / 2 - gap, 0.003, height / 2 - gap), front)
            piece.ball((i * 0.05, -half_y, height * 0.52), (0.012, 0.016, 0.05), knob)
    if height < 1.4:
        kit.tops.append(Top(frame.at(0, 0, height), half_x * 0.9, half_y * 0.8, 0.5))


def bookshelf(kit: Kit, frame: Frame, half_x: float, height: float, *, books: float = 1.0) -> None:
    """An open shelf of half depth 0.16; a share `books` of its boards carries books, the others are free tops."""
    piece, wood = kit.thing("bookshelf", frame), kit.wood()
    piece.box((0, 0.145, height / 2), (half_x, 0.012, height / 2), wood)
    for i in (-1, 1):
        piece.box((i * (half_x - 0.015), 0, height / 2), (0.015, 0.16, height / 2), wood)
    boards = max(2, round(height / 0.38))
    step = (height - 0.03) / boards
    for k in range(boards + 1):
        piece.box((0, -0.005, 0.015 + k * step), (half_x - 0.03, 0.15, 0.012), wood)
    for k in range(boards):
        floor = frame.at(0, 0, 0.028 + k * step)
        if kit.rng.random() < books:
            row_of_books(kit, floor, half_x - 0.05, step - 0.06)
        else:
            kit.tops.append(Top(floor, half_x * 0.8, 0.1, step - 0.05))
    kit.tops.append(Top(frame.at(0, 0, height), half_x * 0.8, 0.1, 0.3))


def row_of_books(kit: Kit, frame: Frame, half_x: float, height: float) -> None:
    """Blocks of upright books of different heights, with gaps."""
    x = -half_x
    while x < half_x - 0.06:
        half = min(kit.between(0.05, 0.16), (half_x - x) / 2)
        tall = height * kit.between(0.6, 0.95) / 2
        spines = kit.material(kit.palette.cloth(), "books", gloss=0.1)
        block = kit.thing("book", frame)
        block.box((x + half, kit.between(-0.01, 0.04), tall), (half, 0.09, tall), spines)
        x += 2 * half + kit.rng.choice((0.004, 0.004, 0.1))


def tv_bench(kit: Kit, frame: Frame, half_x: float) -> None:
    """A low bench of half depth 0.2 with a television on it and a loudspeaker beside it."""
    cabinet(kit, frame, "tv_bench", half_x, 0.2, 0.42)
    kit.tops.pop()
    half = min(half_x - 0.22, kit.between(0.42, 0.58))
    tv, dark = kit.thing("tv", frame.at(0, 0.02, 0.42)), kit.dark()
    tv.box((0, 0, 0.02), (0.16, 0.09, 0.02), dark)
    tv.box((0, 0.02, 0.09), (0.03, 0.02, 0.06), dark)
    tv.box((0, 0, 0.12 + half * 0.58), (half, 0.025, half * 0.58), dark)
    tv.box((0, -0.022, 0.12 + half * 0.58), (half - 0.025, 0.008, half * 0.58 - 0.025), kit.screen())
    speaker = kit.thing("loudspeaker", frame.at(half_x - 0.1, 0, 0.42))
    speaker.box((0, 0, 0.14), (0.08, 0.08, 0.14), dark)
    for z, radius in ((0.09, 0.055), (0.2, 0.035)):
        speaker.ring((0, -0.08, z), radius, 0.012, kit.metal(), axis="y")


def workplace(kit: Kit, frame: Frame, half_x: float) -> None:
    """A desk of half depth 0.36 with a monitor and keyboard, or a laptop."""
    table(kit, frame, "desk", half_x, 0.36, 0.74)
    kit.tops.pop()
    kit.tops.append(Top(frame.at(-half_x * 0.62, 0, 0.74), half_x * 0.3, 0.26))
    kit.tops.append(Top(frame.at(half_x * 0.66, 0.1, 0.74), half_x * 0.26, 0.2))
    desk = frame.at(0.05, 0.05, 0.74)
    if kit.rng.random() < 0.3:
        laptop(kit, desk)
        return
    monitor, dark = kit.thing("monitor", desk.at(0, 0.12)), kit.dark()
    half = kit.between(0.24, 0.32)
    monitor.cylinder((0, 0.03, 0.01), 0.1, 0.01, dark)
    monitor.cylinder((0, 0.04, 0.12), 0.02, 0.11, dark)
    monitor.box((0, 0, 0.12 + half * 0.6), (half, 0.018, half * 0.6), dark)
    monitor.box((0, -0.016, 0.12 + half * 0.6), (half - 0.015, 0.006, half * 0.6 - 0.015), kit.screen())
    keys = kit.material(kit.palette.metal(), "checker", gloss=0.1)
    kit.thing("keyboard", desk.at(0, -0.2)).rounded((0, 0, 0.014), (0.2, 0.07, 0.013), 0.01, keys)


def laptop(kit: Kit, frame: Frame) -> None:
    """An open laptop, about 0.34 wide."""
    piece, body = kit.thing("laptop", frame), kit.metal()
    piece.box((0, 0, 0.01), (0.17, 0.115, 0.01), body)
    piece.slanted((0, 0.15, 0.115), (0.17, 0.007, 0.11), -0.3, body)
    piece.slanted((0, 0.142, 0.115), (0.158, 0.004, 0.1), -0.3, kit.screen())


def floor_lamp(kit: Kit, frame: Frame) -> None:
    """A standing lamp, 0.2 in half size."""
    piece, metal = kit.thing("floor_lamp", frame), kit.metal()
    piece.cylinder((0, 0, 0.015), 0.14, 0.015, metal)
    piece.cylinder((0, 0, 0.75), 0.014, 0.74, metal)
    piece.cone((0, 0, 1.58), 0.2, 0.13, 0.13, kit.shine(LAMPLIGHT, 0.7))
