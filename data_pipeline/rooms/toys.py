"""Vehicles and animals of the VOC classes. They face -x at scale 1 as toys of 0.3 to 0.8 m; a frame's larger scale
makes a real dog, bicycle or motorbike of them."""

from data_pipeline.rooms.kit import Kit
from data_pipeline.rooms.scene import Frame, Material, Thing


def _wheel(piece: Thing, x: float, y: float, radius: float, tyre: Material, hub: Material) -> None:
    piece.ring((x, y, radius), radius * 0.72, radius * 0.28, tyre, axis="y")
    piece.cylinder((x, y, radius), radius * 0.6, radius * 0.2, hub, axis="y")


def car(kit: Kit, frame: Frame) -> None:
    """A car, 0.5 x 0.22 x 0.2."""
    piece, body, glass, tyre, hub = kit.thing("car", frame), kit.toy(), kit.dark(), kit.dark(), kit.metal()
    piece.rounded((0, 0, 0.085), (0.25, 0.105, 0.05), 0.04, body)
    piece.rounded((0.02, 0, 0.145), (0.14, 0.09, 0.055), 0.045, glass)
    piece.rounded((0.02, 0, 0.186), (0.1, 0.075, 0.014), 0.012, body)
    for x in (-0.15, 0.15):
        for y in (-0.1, 0.1):
            _wheel(piece, x, y, 0.05, tyre, hub)
    for y in (-0.07, 0.07):
        piece.ball((-0.245, y, 0.095), (0.015, 0.025, 0.02), kit.white())


def bus(kit: Kit, frame: Frame) -> None:
    """A bus, 0.6 x 0.2 x 0.25."""
    piece, body, glass, tyre, hub = kit.thing("bus", frame), kit.toy(), kit.dark(), kit.dark(), kit.metal()
    piece.rounded((0, 0, 0.15), (0.3, 0.1, 0.105), 0.02, body)
    for k in range(5):
        piece.box((-0.22 + 0.11 * k, 0, 0.19), (0.042, 0.102, 0.036), glass)
    piece.box((-0.297, 0, 0.185), (0.006, 0.085, 0.045), glass)
    for x in (-0.18, 0.18):
        for y in (-0.085, 0.085):
            _wheel(piece, x, y, 0.05, tyre, hub)


def train(kit: Kit, frame: Frame) -> None:
    """A steam engine with a wagon, 0.84 x 0.18 x 0.26."""
    piece, body, roof, dark, hub = kit.thing("train", frame), kit.toy(), kit.toy(), kit.dark(), kit.metal()
    piece.box((-0.2, 0, 0.07), (0.21, 0.07, 0.02), dark)
    piece.cylinder((-0.26, 0, 0.14), 0.06, 0.14, body, axis="x")
    piece.cone((-0.35, 0, 0.225), 0.02, 0.035, 0.035, dark)
    piece.box((-0.07, 0, 0.15), (0.065, 0.075, 0.08), body)
    piece.box((-0.07, 0, 0.238), (0.08, 0.085, 0.01), roof)
    piece.box((0.23, 0, 0.13), (0.17, 0.075, 0.07), roof)
    piece.box((0.03, 0, 0.06), (0.04, 0.015, 0.01), dark)
    for x in (-0.32, -0.2, -0.08, 0.13, 0.33):
        for y in (-0.075, 0.075):
            _wheel(piece, x, y, 0.045, dark, hub)


def motorbike(kit: Kit, frame: Frame) -> None:
    """A motorbike, 0.48 x 0.18 x 0.28."""
    piece, body, dark, steel = kit.thing("motorbike", frame), kit.toy(), kit.dark(), kit.metal()
    for x in (-0.16, 0.16):
        _wheel(piece, x, 0, 0.075, dark, steel)
    piece.limb((-0.16, 0, 0.075), (-0.09, 0, 0.24), 0.012, 0.012, steel)
    piece.limb((-0.09, -0.09, 0.255), (-0.09, 0.09, 0.255), 0.01, 0.01, dark)
    piece.ball((-0.03, 0, 0.19), (0.08, 0.04, 0.04), body)
    piece.ball((0.09, 0, 0.18), (0.1, 0.04, 0.025), dark)
    piece.rounded((0, 0, 0.105), (0.07, 0.04, 0.045), 0.02, steel)
    piece.ball((-0.12, 0, 0.21), (0.025, 0.03, 0.03), kit.white())
    piece.limb((0.05, 0.04, 0.07), (0.2, 0.05, 0.09), 0.014, 0.018, steel)


def bicycle(kit: Kit, frame: Frame) -> None:
    """A bicycle of real size: 1.7 x 0.5 x 1.0."""
    piece, paint, dark, steel = kit.thing("bicycle", frame), kit.toy(), kit.dark(), kit.metal()
    for x in (-0.52, 0.52):
        piece.ring((x, 0, 0.33), 0.305, 0.024, dark, axis="y")
        piece.cylinder((x, 0, 0.33), 0.03, 0.04, steel, axis="y")
        for dx, dz in ((0.29, 0.0), (0.145, 0.251), (-0.145, 0.251)):
            piece.limb((x - dx, 0, 0.33 - dz), (x + dx, 0, 0.33 + dz), 0.005, 0.005, steel)
    crank, seat, head, rear, front = (0.05, 0, 0.3), (0.2, 0, 0.75), (-0.36, 0, 0.74), (0.52, 0, 0.33), (-0.52, 0, 0.33)
    for start, end in ((crank, seat), (crank, head), (seat, head), (crank, rear), (seat, rear), (head, front)):
        piece.limb(start, end, 0.02, 0.018, paint)
    piece.limb(seat, (0.23, 0, 0.86), 0.014, 0.014, steel)
    piece.ball((0.23, 0, 0.89), (0.13, 0.06, 0.03), dark)
    piece.limb(head, (-0.33, 0, 0.9), 0.016, 0.016, steel)
    piece.limb((-0.33, -0.24, 0.94), (-0.33, 0.24, 0.94), 0.016, 0.016, dark)
    piece.ring((0.05, -0.04, 0.3), 0.09, 0.01, steel, axis="y")


def aeroplane(kit: Kit, frame: Frame) -> None:
    """An airliner, 0.6 x 0.44 x 0.25, its belly 0.04 above the ground."""
    piece, body, wing, dark = kit.thing("aeroplane", frame), kit.white(), kit.toy(), kit.dark()
    piece.limb((-0.22, 0, 0.1), (0.12, 0, 0.1), 0.055, 0.055, body)
    piece.limb((0.12, 0, 0.1), (0.28, 0, 0.13), 0.055, 0.02, body)
    for i in (-1, 1):
        piece.limb((-0.06, i * 0.04, 0.09), (0.08, i * 0.21, 0.1), 0.024, 0.012, wing)
        piece.limb((0.24, i * 0.01, 0.13), (0.29, i * 0.11, 0.135), 0.014, 0.01, wing)
        piece.limb((-0.05, i * 0.11, 0.065), (0.03, i * 0.11, 0.065), 0.025, 0.02, dark)
    piece.limb((0.24, 0, 0.13), (0.3, 0, 0.24), 0.02, 0.014, wing)
    piece.ball((-0.25, 0, 0.12), (0.03, 0.035, 0.018), dark)


def boat(kit: Kit, frame: Frame) -> None:
    """A sailing boat on a stand, 0.56 x 0.16 x 0.46."""
    piece, hull, sail = kit.thing("boat", frame), kit.toy(), kit.material(kit.palette.white(), gloss=0.02)
    piece.ball((0, 0, 0.09), (0.27, 0.075, 0.06), hull)
    piece.ball((0, 0, 0.115), (0.25, 0.065, 0.04), kit.wood())
    piece.box((0, 0, 0.02), (0.07, 0.05, 0.02), kit.wood())
    piece.cylinder((0, 0, 0.28), 0.009, 0.18, kit.wood())
    for k in range(6):  # a triangular sail in strips that shorten upwards
        length = 0.17 * (1 - k / 6.5)
        piece.box((0.015 + length / 2, 0, 0.185 + 0.045 * k), (length / 2, 0.006, 0.0225), sail)
        length *= 0.65
        piece.box((-0.015 - length / 2, 0, 0.185 + 0.045 * k), (length / 2, 0.006, 0.0225), sail)


def bird(kit: Kit, frame: Frame) -> None:
    """A parrot on a perch, 0.26 tall."""
    piece, feathers, wing = kit.thing("bird", frame), kit.toy(), kit.toy()
    kit.thing("blocks", frame).cylinder((0, 0, 0.02), 0.05, 0.02, kit.wood())
    piece.limb((0.02, 0, 0.1), (-0.02, 0, 0.17), 0.055, 0.045, feathers)
    piece.ball((-0.04, 0, 0.225), (0.042, 0.038, 0.04), feathers)
    piece.limb((-0.075, 0, 0.22), (-0.1, 0, 0.2), 0.014, 0.005, kit.material(kit.palette.hair()))
    piece.limb((0.04, 0, 0.1), (0.12, 0, 0.03), 0.028, 0.014, wing)
    for i in (-1, 1):
        piece.ball((0.015, i * 0.045, 0.135), (0.05, 0.016, 0.065), wing)
        piece.ball((-0.065, i * 0.03, 0.235), (0.01, 0.008, 0.01), kit.dark())
        piece.limb((0, i * 0.02, 0.08), (0, i * 0.02, 0.04), 0.008, 0.008, kit.dark())


def _quadruped(
    piece: Thing,
    coat: Material,
    leg_coat: Material,
    *,
    body: tuple[float, float, float],
    leg: float,
    thickness: float,
    neck: tuple[float, float],
    head: tuple[float, float, float],
) -> tuple[float, float]:
    """Trunk (half sizes `body`), four legs of a length and thickness, neck (forward, up) and head (radii).

    Returns the head's position (x, z).
    """
    x, y, z = body
    height = leg + z
    piece.limb((-x * 0.6, 0, height), (x * 0.6, 0, height), y, y * 0.95, coat)
    for i in (-0.62, 0.62):
        for j in (-0.55, 0.55):
            piece.limb((i * x, j * y, height), (i * x * 1.05, j * y, thickness), thickness * 1.5, thickness, leg_coat)
    head_x, head_z = -x * 0.75 - neck[0], height + neck[1]
    piece.limb((-x * 0.65, 0, height + y * 0.3), (head_x, 0, head_z), y * 0.62, head[2] * 0.75, coat)
    piece.ball((head_x - head[0] * 0.35, 0, head_z), head, coat)
    return head_x, head_z


def dog(kit: Kit, frame: Frame) -> None:
    """A dog, 0.5 x 0.16 x 0.42 (a third bigger in life)."""
    piece, coat = kit.thing("dog", frame), kit.material(kit.palette.fur(), ("plain", "dots"), gloss=0.03)
    x, z = _quadruped(
        piece,
        coat,
        coat,
        body=(0.17, 0.075, 0.07),
        leg=0.16,
        thickness=0.022,
        neck=(0.06, 0.12),
        head=(0.07, 0.052, 0.055),
    )
    piece.limb((x - 0.05, 0, z - 0.015), (x - 0.12, 0, z - 0.025), 0.032, 0.024, coat)
    piece.ball((x - 0.145, 0, z - 0.02), (0.012, 0.014, 0.012), kit.dark())
    piece.limb((0.15, 0, 0.25), (0.25, 0, 0.36), 0.018, 0.012, coat)
    for i in (-1, 1):
        piece.ball((x + 0.005, i * 0.052, z + 0.005), (0.022, 0.012, 0.045), coat)
        piece.ball((x - 0.065, i * 0.03, z + 0.025), (0.01, 0.008, 0.01), kit.dark())


def cat(kit: Kit, frame: Frame) -> None:
    """A cat that sits, 0.3 x 0.16 x 0.36."""
    coat = kit.material(kit.palette.fur(), ("stripes", "plain"), gloss=0.03)
    piece = kit.thing("cat", frame)
    piece.ball((0.04, 0, 0.09), (0.11, 0.085, 0.09), coat)
    piece.limb((0.02, 0, 0.12), (-0.05, 0, 0.23), 0.075, 0.05, coat)
    piece.ball((-0.07, 0, 0.285), (0.06, 0.06, 0.052), coat)
    piece.limb((0.12, 0.04, 0.03), (0.0, 0.13, 0.025), 0.02, 0.016, coat)
    for i in (-1, 1):
        piece.limb((-0.055, i * 0.035, 0.2), (-0.08, i * 0.035, 0.02), 0.028, 0.022, coat)
        piece.cone((-0.06, i * 0.038, 0.345), 0.022, 0.002, 0.025, coat)
        piece.ball((-0.12, i * 0.024, 0.295), (0.008, 0.01, 0.012), kit.material(kit.palette.leaf(), gloss=0.8))


def cow(kit: Kit, frame: Frame) -> None:
    """A cow, 0.44 x 0.14 x 0.3."""
    piece = kit.thing("cow", frame)
    coat = kit.material(((0.85, 0.83, 0.8), (0.04, 0.035, 0.03)), "dots", gloss=0.05)
    x, z = _quadruped(
        piece,
        coat,
        kit.white(),
        body=(0.16, 0.075, 0.075),
        leg=0.1,
        thickness=0.018,
        neck=(0.05, 0.06),
        head=(0.065, 0.04, 0.042),
    )
    piece.ball((x - 0.075, 0, z - 0.012), (0.025, 0.034, 0.028), kit.material(kit.palette.skin()))
    piece.limb((0.16, 0, 0.2), (0.18, 0, 0.09), 0.008, 0.012, coat)
    for i in (-1, 1):
        piece.limb((x, i * 0.03, z + 0.03), (x - 0.01, i * 0.055, z + 0.065), 0.01, 0.005, kit.wood())
        piece.ball((x + 0.01, i * 0.055, z + 0.01), (0.012, 0.025, 0.014), coat)


def horse(kit: Kit, frame: Frame) -> None:
    """A horse, 0.44 x 0.12 x 0.38."""
    piece, coat, mane = kit.thing("horse", frame), kit.material(kit.palette.wood(), gloss=0.1), kit.dark()
    x, z = _quadruped(
        piece,
        coat,
        coat,
        body=(0.15, 0.06, 0.06),
        leg=0.14,
        thickness=0.015,
        neck=(0.07, 0.13),
        head=(0.075, 0.032, 0.036),
    )
    piece.limb((x + 0.02, 0, z + 0.035), (-0.1, 0, 0.27), 0.018, 0.016, mane)
    piece.limb((0.14, 0, 0.22), (0.21, 0, 0.08), 0.018, 0.012, mane)
    for i in (-1, 1):
        piece.cone((x + 0.01, i * 0.018, z + 0.045), 0.012, 0.002, 0.02, coat)


def sheep(kit: Kit, frame: Frame) -> None:
    """A sheep, 0.36 x 0.18 x 0.25."""
    piece, wool = kit.thing("sheep", frame), kit.material(((0.82, 0.8, 0.74), (0.7, 0.68, 0.6)), "fabric", gloss=0.0)
    face = kit.material(kit.palette.hair())
    x, z = _quadruped(
        piece,
        wool,
        face,
        body=(0.12, 0.09, 0.08),
        leg=0.07,
        thickness=0.016,
        neck=(0.05, 0.03),
        head=(0.05, 0.035, 0.036),
    )
    piece.ball((x - 0.04, 0, z - 0.01), (0.04, 0.03, 0.03), face)
    for k, (dx, dy) in enumerate(
        ((-0.08, 0.05), (0.0, -0.06), (0.08, 0.05), (0.06, -0.05), (-0.06, -0.05), (0.0, 0.05))
    ):
        piece.ball((dx, dy, 0.19 + 0.01 * (k % 2)), (0.055, 0.05, 0.045), wool)
    for i in (-1, 1):
        piece.ball((x, i * 0.045, z + 0.005), (0.012, 0.022, 0.01), face)
