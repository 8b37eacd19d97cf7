"""Fixed equipment of kitchens and bathrooms, and storage. Same conventions as `furniture`."""

from data_pipeline.rooms.kit import Kit, Top
from data_pipeline.rooms.scene import Frame

_WATER = ((0.35, 0.6, 0.7), (0.45, 0.7, 0.8))


def counter(kit: Kit, frame: Frame, half_x: float) -> None:
    """A kitchen base unit of half depth 0.3 and height 0.9, with a worktop."""
    piece, body = kit.thing("cabinet", frame), kit.lacquer()
    top = kit.material(kit.palette.stone(), ("marble", "plain", "wood"), gloss=0.3)
    piece.box((0, 0.02, 0.43), (half_x - 0.005, 0.27, 0.43), body)
    piece.box((0, 0, 0.88), (half_x, 0.3, 0.02), top)
    for i in (-1, 1):
        piece.box((i * half_x / 2, -0.25, 0.46), (half_x / 2 - 0.004, 0.003, 0.36), body)
        piece.limb((i * 0.06, -0.28, 0.68), (i * 0.06, -0.28, 0.78), 0.008, 0.008, kit.metal())
    kit.tops.append(Top(frame.at(0, 0, 0.9), half_x * 0.85, 0.22, 0.45))


def wall_cupboard(kit: Kit, frame: Frame, half_x: float, half_z: float) -> None:
    """A cupboard on the wall, half depth 0.16; the frame's origin is on the wall at its middle."""
    piece, body = kit.thing("cabinet", frame), kit.lacquer()
    piece.box((0, -0.16, 0), (half_x, 0.15, half_z), body)
    for i in (-1, 1):
        piece.box((i * half_x / 2, -0.31, 0), (half_x / 2 - 0.004, 0.003, half_z - 0.004), body)
        piece.ball((i * 0.05, -0.33, -half_z * 0.6), (0.012, 0.014, 0.04), kit.metal())


def kitchen_sink(kit: Kit, frame: Frame) -> None:
    """A base unit of half width 0.4 with a basin and tap."""
    counter(kit, frame, 0.4)
    kit.tops.pop()
    basin, steel = kit.thing("sink", frame.at(0, 0, 0.9)), kit.metal()
    basin.rounded((0, -0.03, 0.008), (0.26, 0.2, 0.012), 0.011, steel)
    basin.ball((0, -0.03, 0.018), (0.21, 0.15, 0.008), kit.dark())
    basin.limb((0, 0.2, 0.0), (0, 0.2, 0.24), 0.018, 0.014, steel)
    basin.limb((0, 0.2, 0.24), (0, 0.02, 0.2), 0.014, 0.012, steel)


def stove(kit: Kit, frame: Frame) -> None:
    """A stove, 0.3 x 0.3 in half size, with a pan."""
    piece, white, dark = kit.thing("stove", frame), kit.white(), kit.dark()
    piece.box((0, 0.01, 0.45), (0.3, 0.29, 0.45), white)
    piece.box((0, -0.285, 0.42), (0.24, 0.012, 0.2), dark)
    piece.limb((-0.22, -0.3, 0.67), (0.22, -0.3, 0.67), 0.012, 0.012, kit.metal())
    piece.box((0, 0, 0.902), (0.28, 0.27, 0.006), dark)
    for i in (-1, 0, 1):
        piece.cylinder((i * 0.12, -0.295, 0.8), 0.025, 0.01, dark, axis="y")
    for i in (-1, 1):
        for j in (-1, 1):
            piece.ring((i * 0.14, j * 0.12, 0.912), 0.075, 0.008, kit.metal())
    pan = kit.thing("pan", frame.at(-0.14, -0.12, 0.92))
    pan.cone((0, 0, 0.035), 0.09, 0.12, 0.035, kit.accent())
    pan.limb((0.1, -0.02, 0.06), (0.26, -0.06, 0.07), 0.012, 0.014, dark)


def fridge(kit: Kit, frame: Frame, height: float) -> None:
    """A fridge, 0.32 x 0.32 in half size."""
    body = kit.white() if kit.rng.random() < 0.6 else kit.metal()
    piece, split = kit.thing("fridge", frame), height * kit.between(0.55, 0.7)
    piece.rounded((0, 0.01, split / 2), (0.32, 0.3, split / 2 - 0.005), 0.03, body)
    piece.rounded((0, 0.01, (split + height) / 2), (0.32, 0.3, (height - split) / 2 - 0.005), 0.03, body)
    for z in (split - 0.25, split + 0.2):
        piece.limb((-0.25, -0.305, z - 0.1), (-0.25, -0.305, z + 0.1), 0.012, 0.012, kit.metal())


def washer(kit: Kit, frame: Frame) -> None:
    """A washing machine, 0.3 x 0.3 in half size."""
    piece, white = kit.thing("washer", frame), kit.white()
    piece.rounded((0, 0.01, 0.43), (0.3, 0.28, 0.42), 0.02, white)
    piece.ring((0, -0.27, 0.42), 0.16, 0.025, kit.metal(), axis="y")
    piece.ball((0, -0.265, 0.42), (0.145, 0.02, 0.145), kit.dark())
    kit.tops.append(Top(frame.at(0, 0, 0.85), 0.25, 0.22, 0.4))


def microwave(kit: Kit, frame: Frame) -> None:
    """A microwave oven, 0.24 x 0.17 in half size."""
    piece = kit.thing("microwave", frame)
    piece.rounded((0, 0, 0.14), (0.24, 0.16, 0.135), 0.015, kit.metal())
    piece.box((-0.05, -0.16, 0.14), (0.16, 0.008, 0.1), kit.dark())


def toilet(kit: Kit, frame: Frame) -> None:
    """A toilet, 0.22 x 0.36 in half size."""
    piece, white = kit.thing("toilet", frame), kit.white()
    piece.cone((0, -0.04, 0.17), 0.13, 0.17, 0.17, white)
    piece.ball((0, -0.1, 0.33), (0.2, 0.26, 0.1), white)
    piece.ring((0, -0.1, 0.405), 0.15, 0.035, white)
    piece.rounded((0, 0.26, 0.56), (0.21, 0.09, 0.2), 0.03, white)
    piece.cylinder((0, 0.26, 0.77), 0.025, 0.01, kit.metal())


def washbasin(kit: Kit, frame: Frame) -> None:
    """A full washbasin on a pedestal with a tap, 0.28 x 0.24 in half size."""
    piece, white, steel = kit.thing("sink", frame), kit.white(), kit.metal()
    piece.cone((0, 0.06, 0.36), 0.1, 0.07, 0.36, white)
    piece.cone((0, 0, 0.78), 0.12, 0.24, 0.08, white)
    piece.ring((0, 0, 0.855), 0.22, 0.02, white)
    piece.ball((0, 0, 0.86), (0.2, 0.2, 0.008), kit.material(_WATER, gloss=0.9))
    piece.limb((0, 0.2, 0.86), (0, 0.2, 1.02), 0.018, 0.014, steel)
    piece.limb((0, 0.2, 1.02), (0, 0.06, 1.0), 0.014, 0.012, steel)


def bathtub(kit: Kit, frame: Frame) -> None:
    """A bathtub, 0.8 x 0.38 in half size, filled."""
    piece, white = kit.thing("bathtub", frame), kit.white()
    piece.rounded((0, 0, 0.27), (0.8, 0.38, 0.27), 0.06, white)
    water = kit.material(_WATER, "marble", gloss=0.9)
    piece.ball((0, 0, 0.54), (0.7, 0.29, 0.012), water)
    piece.limb((0.6, 0.33, 0.54), (0.6, 0.33, 0.72), 0.02, 0.02, kit.metal())
    piece.limb((0.6, 0.33, 0.72), (0.6, 0.2, 0.68), 0.02, 0.015, kit.metal())


def towel(kit: Kit, frame: Frame) -> None:
    """A towel on a rail; the frame's origin is on the wall at its middle; 0.25 x 0.3 in half size."""
    kit.thing("towel", frame).rounded((0, -0.06, -0.03), (0.22, 0.025, 0.27), 0.02, kit.cloth())
    kit.thing("towel", frame).limb((-0.27, -0.06, 0.26), (0.27, -0.06, 0.26), 0.012, 0.012, kit.metal())


def file_cabinet(kit: Kit, frame: Frame, height: float) -> None:
    """A steel filing cabinet, 0.24 x 0.3 in half size."""
    piece, steel = kit.thing("file_cabinet", frame), kit.metal()
    piece.box((0, 0.01, height / 2), (0.24, 0.29, height / 2), steel)
    drawers = round(height / 0.33)
    half = height / drawers / 2
    for k in range(drawers):
        piece.box((0, -0.28, (2 * k + 1) * half), (0.234, 0.003, half - 0.004), steel)
        piece.limb((-0.06, -0.3, (2 * k + 1.2) * half), (0.06, -0.3, (2 * k + 1.2) * half), 0.01, 0.01, kit.dark())
    kit.tops.append(Top(frame.at(0, 0, height), 0.2, 0.22, 0.5))


def cartons(kit: Kit, frame: Frame, half: float) -> None:
    """A pile of one to three cartons, each smaller than the one below."""
    z, size = 0.0, half
    for _ in range(kit.rng.choice((1, 2, 2, 3))):
        x, y, tall = size * kit.between(0.75, 1.0), size * kit.between(0.75, 1.0), kit.between(0.12, 0.25)
        card = kit.material(((0.5, 0.33, 0.18), (0.42, 0.27, 0.14)), "plain", gloss=0.02)
        body = card if kit.rng.random() < 0.7 else kit.material(kit.palette.cloth(), ("plain", "stripes"))
        box = kit.thing("carton", frame)
        box.box((0, 0, z + tall), (x * 0.7, y * 0.7, tall), body, turn=kit.between(-0.25, 0.25))
        z, size = z + 2 * tall, size * kit.between(0.7, 0.95)


def barrel(kit: Kit, frame: Frame) -> None:
    """A barrel of radius 0.27."""
    piece, wood, hoop = kit.thing("barrel", frame), kit.wood(), kit.metal()
    piece.cone((0, 0, 0.2), 0.22, 0.265, 0.2, wood)
    piece.cone((0, 0, 0.6), 0.265, 0.22, 0.2, wood)
    for z in (0.1, 0.4, 0.7):
        piece.ring((0, 0, z), 0.262 if z == 0.4 else 0.238, 0.012, hoop)


def paper_bin(kit: Kit, frame: Frame) -> None:
    """A waste-paper bin of radius 0.16."""
    piece, body = kit.thing("bin", frame), kit.accent()
    piece.cone((0, 0, 0.18), 0.12, 0.15, 0.18, body)
    piece.ring((0, 0, 0.36), 0.145, 0.012, body)
