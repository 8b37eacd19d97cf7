"""A scene under construction (things made of solids in their own frames) and its frozen form, a structure of arrays.

World frame: x right, y forward, z up, metres; the room is |x| <= half width, |y| <= half depth, 0 <= z <= height.
A thing's own frame: x to its right, +y to its back, z up, origin on the ground below its middle.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.rooms.catalogue import CLASS_INDEX
from data_pipeline.rooms.palette import Rgb

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
Point = tuple[float, float, float]
Axis = Literal["x", "y", "z"]
Rotation = tuple[Point, Point, Point]

TEXTURES = (
    "plain", "wood", "tiles", "brick", "stripes", "fabric", "carpet", "marble", "checker", "dots", "picture", "sky",
    "books", "screen", "panel",
)  # fmt: skip


class Kind(IntEnum):
    """Solids, with the meaning of their four dimensions (metres)."""

    SHELL = 0  # a face of the room itself: axis (0, 1, 2), side (-1, 1)
    BOX = 1  # half sizes x, y, z
    ROUNDED = 2  # half sizes x, y, z, and the radius of edges and corners
    ELLIPSOID = 3  # radii x, y, z
    FRUSTUM = 4  # radius at the bottom, radius at the top, half height; capped
    LIMB = 5  # hull of two spheres: lower radius, upper radius, half distance of their centres
    RING = 6  # torus around z: radius of the circle, radius of the tube


@dataclass(frozen=True, kw_only=True)
class Material:
    """How a surface looks.

    Attributes:
        texture: one of `TEXTURES`.
        ground, figure: linear RGB albedo of the two colours that the texture mixes.
        period: size of the pattern, metres.
        gloss: strength of the highlight, 0..1.
        glow: light it gives off, relative to its albedo; glowing things cast no shadow.
        seed: which of the texture's variants.
    """

    texture: str
    ground: Rgb
    figure: Rgb
    period: float = 0.2
    gloss: float = 0.1
    glow: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Frame:
    """Where a thing stands: position of its origin, turn about z (radians), scale."""

    x: float
    y: float
    z: float = 0.0
    yaw: float = 0.0
    scale: float = 1.0

    def at(self, x: float, y: float, z: float = 0.0, *, turn: float = 0.0, scale: float = 1.0) -> "Frame":
        """The frame at a point given in this frame."""
        wx, wy, wz = self.point((x, y, z))
        return Frame(wx, wy, wz, self.yaw + turn, self.scale * scale)

    def point(self, local: Point) -> Point:
        """World position of a point of this frame."""
        cos, sin, s = math.cos(self.yaw), math.sin(self.yaw), self.scale
        x, y, z = local
        return self.x + s * (x * cos - y * sin), self.y + s * (x * sin + y * cos), self.z + s * z

    def rotate(self, local: Rotation) -> Rotation:
        """World axes of a solid whose axes are the rows of `local`."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        rows = [(x * cos - y * sin, x * sin + y * cos, z) for x, y, z in local]
        return rows[0], rows[1], rows[2]


@dataclass(frozen=True)
class Solids:
    """All P solids of a scene; the first six are the faces of the room (-x, +x, -y, +y, floor, ceiling).

    Attributes:
        kind: (P,) int32. centre: (P, 3) float32. axes: (P, 3, 3) float32, rows are the solid's axes in the world.
        dims: (P, 4) float32, see `Kind`. extent: (P, 3) float32, half sizes of the bounding box along the axes.
        object, cls, part, material: (P,) int32. glass: (P,) bool, window panes. casts: (P,) bool, casts a shadow.
        materials: the table that `material` points into.
        half: half sizes of the room (3,) float32.
    """

    kind: Ints
    centre: Floats
    axes: Floats
    dims: Floats
    extent: Floats
    object: Ints
    cls: Ints
    part: Ints
    material: Ints
    glass: Bools
    casts: Bools
    materials: tuple[Material, ...]
    half: Floats


_IDENTITY: Rotation = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# Right-handed axes whose third row (the axis of symmetry of a solid) points along x, y or z.
_TURNED: dict[Axis, Rotation] = {
    "x": ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
    "y": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "z": _IDENTITY,
}


class Scene:
    """Collects solids. The room's own faces are added by the constructor."""

    def __init__(self, half_width: float, half_depth: float, height: float, faces: Sequence[Material]) -> None:
        """`faces`: materials of -x, +x, -y, +y, floor, ceiling."""
        self.half_width, self.half_depth, self.height = half_width, half_depth, height
        self._rows: list[tuple[Kind, Point, Rotation, tuple[float, ...], Point, int, int, int, int]] = []
        self._materials: list[Material] = []
        self._material_index: dict[int, int] = {}
        self._objects = 0
        classes = ("wall", "wall", "wall", "wall", "floor", "ceiling")
        for face, (cls, material) in enumerate(zip(classes, faces, strict=True)):
            dims = (float(face // 2), float(face % 2) * 2 - 1, 0.0, 0.0)
            extent = (half_width, half_depth, height / 2)
            self.add(Kind.SHELL, (0, 0, height / 2), _IDENTITY, dims, extent, self.new_object(), cls, 0, material)

    def new_object(self) -> int:
        """A fresh object id."""
        self._objects += 1
        return self._objects

    def add(
        self,
        kind: Kind,
        centre: Point,
        axes: Rotation,
        dims: tuple[float, ...],
        extent: Point,
        object_id: int,
        cls: str,
        part: int,
        material: Material,
    ) -> None:
        """Add one solid in world coordinates."""
        index = self._material_index.get(id(material))
        if index is None:
            index = self._material_index[id(material)] = len(self._materials)
            self._materials.append(material)
        self._rows.append((kind, centre, axes, dims, extent, object_id, CLASS_INDEX[cls], part, index))

    def freeze(self) -> Solids:
        """The arrays that tracing works on."""
        kind, centre, axes, dims, extent, obj, cls, part, material = zip(*self._rows, strict=True)
        index = np.array(material, np.int32)
        materials = tuple(self._materials)
        return Solids(
            kind=np.array(kind, np.int32),
            centre=np.array(centre, np.float32),
            axes=np.array(axes, np.float32),
            dims=np.array(dims, np.float32),
            extent=np.array(extent, np.float32),
            object=np.array(obj, np.int32),
            cls=np.array(cls, np.int32),
            part=np.array(part, np.int32),
            material=index,
            glass=np.array([m.texture == "sky" for m in materials])[index],
            casts=np.array([m.glow == 0 for m in materials])[index],
            materials=materials,
            half=np.array((self.half_width, self.half_depth, self.height / 2), np.float32),
        )


class Thing:
    """One object: adds solids in the object's own frame (positions and sizes in metres times the frame's scale)."""

    def __init__(self, scene: Scene, cls: str, frame: Frame) -> None:
        self._scene, self._cls, self._frame = scene, cls, frame
        self._object = scene.new_object()

    def box(self, centre: Point, half: Point, material: Material, *, turn: float = 0.0, part: int = 0) -> None:
        """A box; `turn` rotates it about its own vertical."""
        self._add(Kind.BOX, centre, _about_z(turn), (*half, 0.0), half, material, part)

    def slanted(self, centre: Point, half: Point, pitch: float, material: Material, *, part: int = 0) -> None:
        """A box leaning about its x axis: positive pitch tips its top towards the back (+y)."""
        cos, sin = math.cos(pitch), math.sin(pitch)
        self._add(
            Kind.BOX, centre, ((1, 0, 0), (0, cos, -sin), (0, sin, cos)), (*half, 0.0), half, material, part
        )  # fmt: skip

    def rounded(self, centre: Point, half: Point, radius: float, material: Material, *, part: int = 0) -> None:
        """A box with rounded edges and corners."""
        radius = min(radius, 0.98 * min(half))
        self._add(Kind.ROUNDED, centre, _IDENTITY, (*half, radius), half, material, part)

    def ball(self, centre: Point, radii: Point, material: Material, *, turn: float = 0.0, part: int = 0) -> None:
        """An ellipsoid."""
        self._add(Kind.ELLIPSOID, centre, _about_z(turn), (*radii, 0.0), radii, material, part)

    def cone(
        self, centre: Point, bottom: float, top: float, half: float, material: Material, *, axis: Axis = "z"
    ) -> None:
        """A capped frustum of half height `half` along `axis`."""
        widest = max(bottom, top)
        extent = (widest, widest, half)
        self._add(Kind.FRUSTUM, centre, _TURNED[axis], (bottom, top, half, 0.0), extent, material, 0)

    def cylinder(self, centre: Point, radius: float, half: float, material: Material, *, axis: Axis = "z") -> None:
        """A capped cylinder of half height `half` along `axis`."""
        self.cone(centre, radius, radius, half, material, axis=axis)

    def ring(self, centre: Point, radius: float, tube: float, material: Material, *, axis: Axis = "z") -> None:
        """A torus around `axis`."""
        extent = (radius + tube, radius + tube, tube)
        self._add(Kind.RING, centre, _TURNED[axis], (radius, tube, 0.0, 0.0), extent, material, 0)

    def limb(
        self, start: Point, end: Point, start_radius: float, end_radius: float, material: Material, *, part: int = 0
    ) -> None:
        """The hull of two balls, as for arms, legs, necks and tubes."""
        along = (end[0] - start[0], end[1] - start[1], end[2] - start[2])
        length = math.hypot(*along)
        if abs(start_radius - end_radius) >= 0.95 * length:  # one ball nearly swallows the other
            radius = max(start_radius, end_radius)
            self.ball(start if start_radius >= end_radius else end, (radius, radius, radius), material, part=part)
            return
        centre = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, (start[2] + end[2]) / 2)
        widest = max(start_radius, end_radius)
        dims = (start_radius, end_radius, length / 2, 0.0)
        self._add(Kind.LIMB, centre, _along(along, length), dims, (widest, widest, length / 2 + widest), material, part)

    def _add(
        self,
        kind: Kind,
        centre: Point,
        axes: Rotation,
        dims: tuple[float, ...],
        extent: Point,
        material: Material,
        part: int,
    ) -> None:
        frame, s = self._frame, self._frame.scale
        self._scene.add(
            kind,
            frame.point(centre),
            frame.rotate(axes),
            tuple(s * d for d in dims),
            (s * extent[0], s * extent[1], s * extent[2]),
            self._object,
            self._cls,
            part,
            material,
        )


def _about_z(turn: float) -> Rotation:
    if turn == 0.0:
        return _IDENTITY
    cos, sin = math.cos(turn), math.sin(turn)
    return (cos, sin, 0.0), (-sin, cos, 0.0), (0.0, 0.0, 1.0)


def _along(direction: Point, length: float) -> Rotation:
    """Right-handed axes whose third row is `direction`."""
    z = (direction[0] / length, direction[1] / length, direction[2] / length)
    helper = (1.0, 0.0, 0.0) if abs(z[0]) < 0.8 else (0.0, 1.0, 0.0)
    x = _cross(helper, z)
    norm = math.hypot(*x)
    x = (x[0] / norm, x[1] / norm, x[2] / norm)
    return x, _cross(z, x), z


def _cross(a: Point, b: Point) -> Point:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
