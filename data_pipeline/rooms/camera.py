"""The camera: a pinhole with square pixels, and the grid of samples it takes.

Samples lie at pixel centres and at pixel corners (a quincunx): with weight 1/2 for the centre and 1/8 for each corner
they anti-alias the image at two samples a pixel, and labels are exact at pixel centres.
"""

import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.rooms.scene import Floats, Point


@dataclass(frozen=True)
class Camera:
    """Position and orthonormal axes in the world, (3,) float32 each; `tangent` is tan(field of view / 2)."""

    position: Floats
    right: Floats
    up: Floats
    forward: Floats
    tangent: float

    @classmethod
    def looking_at(cls, position: Point, target: Point, fov_degrees: float) -> "Camera":
        """A level camera (no roll)."""
        eye = np.array(position, np.float32)
        forward = np.array(target, np.float32) - eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, np.array([0, 0, 1], np.float32))
        right /= np.linalg.norm(right)
        tangent = math.tan(math.radians(fov_degrees) / 2)
        return cls(eye, right, np.cross(right, forward), forward, tangent)

    def focal_pixels(self, size: int) -> float:
        """Focal length in pixels of a size x size image."""
        return size / (2 * self.tangent)

    def grid(self, size: int) -> "SampleGrid":
        """The samples of a size x size image."""
        rows = np.arange(2 * size + 1, dtype=np.float32)
        shift = (rows % 2) / size
        across = (np.arange(size + 1, dtype=np.float32) / size * 2 - 1) * self.tangent
        down = (rows / size - 1) * self.tangent
        row = self.forward - down[:, None] * self.up + (shift * self.tangent)[:, None] * self.right
        return SampleGrid(self, row.astype(np.float32), (across[:, None] * self.right).astype(np.float32))


@dataclass(frozen=True)
class SampleGrid:
    """2 n + 1 rows of n + 1 samples. Even rows are pixel corners; odd rows pixel centres, shifted by half a pixel.

    The direction of sample (i, j) is `row[i] + column[j]`, both (., 3) float32. Its component along the camera's
    axis is 1, so the ray parameter t is the depth along that axis.
    """

    camera: Camera
    row: Floats
    column: Floats

    def directions(self) -> Floats:
        """(2 n + 1, n + 1, 3) float32."""
        directions: Floats = self.row[:, None] + self.column[None]
        return directions
