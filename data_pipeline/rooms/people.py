"""People in a few poses, with their body parts labelled.

Parts are those of `configs.tasks.HUMAN_PARTS`: 1 head, 2 torso (with neck), 3 upper arm, 4 lower arm (with hand),
5 upper leg, 6 lower leg (with foot). A person faces -y; sizes are those of an adult of 1.75 m.
"""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.rooms.kit import Kit
from data_pipeline.rooms.scene import Frame, Material, Point, Thing

Pose = Literal["standing", "walking", "waving", "sitting"]
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)
SEAT_HEIGHT = 0.46
# Half sizes, along x and y, of the floor that a person who stands takes up.
HALF_SIZES: dict[str, tuple[float, float]] = {
    "standing": (0.4, 0.22),
    "walking": (0.32, 0.47),
    "waving": (0.46, 0.22),
}


@dataclass(frozen=True)
class _Clothes:
    skin: Material
    hair: Material
    shirt: Material
    trousers: Material
    shoes: Material
    sleeve: Material  # of the lower arm: shirt or skin


def person(kit: Kit, frame: Frame, pose: Pose) -> None:
    """A person; a sitting one has its feet on the ground and its seat at `SEAT_HEIGHT`, thighs towards -y."""
    shirt, skin = kit.cloth(), kit.material(kit.palette.skin(), gloss=0.05)
    clothes = _Clothes(
        skin=skin,
        hair=kit.material(kit.palette.hair(), gloss=0.1),
        shirt=shirt,
        trousers=kit.material(kit.palette.cloth(), ("plain", "fabric"), gloss=0.02),
        shoes=kit.dark(),
        sleeve=kit.rng.choice((shirt, skin)),
    )
    piece = kit.thing("person", frame)
    hips = SEAT_HEIGHT + 0.12 if pose == "sitting" else 0.93
    _torso_and_head(piece, clothes, hips, long_hair=kit.rng.random() < 0.5)
    for side in (-1, 1):
        _leg(kit, piece, clothes, pose, hips, side)
        _arm(kit, piece, clothes, pose, hips, side)


def _torso_and_head(piece: Thing, clothes: _Clothes, hips: float, *, long_hair: bool) -> None:
    piece.limb((-0.06, 0, hips), (0.06, 0, hips), 0.125, 0.125, clothes.trousers, part=TORSO)
    piece.limb((0, 0, hips + 0.1), (0, 0, hips + 0.36), 0.14, 0.15, clothes.shirt, part=TORSO)
    piece.limb((-0.13, 0, hips + 0.42), (0.13, 0, hips + 0.42), 0.085, 0.085, clothes.shirt, part=TORSO)
    piece.limb((0, 0, hips + 0.46), (0, -0.01, hips + 0.58), 0.055, 0.052, clothes.skin, part=TORSO)
    top = hips + 0.68
    piece.ball((0, -0.02, top), (0.085, 0.1, 0.12), clothes.skin, part=HEAD)
    piece.ball((0, 0.015, top + 0.035), (0.094, 0.1, 0.105), clothes.hair, part=HEAD)
    piece.ball((0, -0.125, top - 0.01), (0.016, 0.02, 0.022), clothes.skin, part=HEAD)
    for side in (-1, 1):
        piece.ball((0.035 * side, -0.108, top + 0.02), (0.013, 0.01, 0.01), clothes.shoes, part=HEAD)
    if long_hair:
        piece.limb((0, 0.05, top), (0, 0.075, top - 0.2), 0.085, 0.075, clothes.hair, part=HEAD)


def _leg(kit: Kit, piece: Thing, clothes: _Clothes, pose: Pose, hips: float, side: int) -> None:
    hip: Point = (0.095 * side, 0, hips - 0.03)
    knee: Point
    ankle: Point
    if pose == "sitting":
        knee, ankle = (0.12 * side, -0.43, SEAT_HEIGHT + 0.08), (0.12 * side, -0.43 + kit.between(-0.14, 0.0), 0.08)
    elif pose == "walking":
        stride = 0.2 * side
        knee, ankle = (0.1 * side, -stride - 0.06, 0.5), (0.1 * side, -stride * 1.6 + 0.06, 0.09)
    else:
        spread = kit.between(0.09, 0.15)
        knee, ankle = (spread * side, -0.01, 0.5), (spread * side, 0.01, 0.08)
    piece.limb(hip, knee, 0.09, 0.065, clothes.trousers, part=UPPER_LEG)
    piece.limb(knee, ankle, 0.063, 0.045, clothes.trousers, part=LOWER_LEG)
    toe: Point = (ankle[0] * 1.1, ankle[1] - 0.14, ankle[2] - 0.035)
    piece.limb((ankle[0], ankle[1] + 0.03, ankle[2] - 0.03), toe, 0.05, 0.04, clothes.shoes, part=LOWER_LEG)


def _arm(kit: Kit, piece: Thing, clothes: _Clothes, pose: Pose, hips: float, side: int) -> None:
    shoulder: Point = (0.19 * side, 0, hips + 0.42)
    elbow: Point
    wrist: Point
    if pose == "sitting":
        elbow, wrist = (0.25 * side, -0.08, hips + 0.16), (0.14 * side, -0.3, hips + 0.08)
    elif pose == "waving" and side == 1:
        elbow, wrist = (0.38, -0.03, hips + 0.5), (0.39, -0.08, hips + 0.75)
    elif pose == "walking":
        swing = 0.14 * side
        elbow, wrist = (0.25 * side, swing, hips + 0.15), (0.26 * side, swing * 1.2 - 0.14, hips - 0.05)
    elif kit.rng.random() < 0.3:  # hand on the hip
        elbow, wrist = (0.35 * side, 0.06, hips + 0.2), (0.17 * side, -0.05, hips + 0.06)
    else:
        elbow, wrist = (0.25 * side, 0.01, hips + 0.14), (0.26 * side, -0.05, hips - 0.1)
    piece.limb(shoulder, elbow, 0.062, 0.05, clothes.shirt, part=UPPER_ARM)
    piece.limb(elbow, wrist, 0.046, 0.036, clothes.sleeve, part=LOWER_ARM)
    hand = tuple(w + 0.28 * (w - e) for w, e in zip(wrist, elbow, strict=True))
    piece.ball((hand[0], hand[1], hand[2]), (0.038, 0.042, 0.055), clothes.skin, part=LOWER_ARM)
