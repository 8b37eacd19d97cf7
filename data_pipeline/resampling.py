"""Where each output pixel reads the source, and how: windows that may turn, shrink, mirror and reach beyond the image.

Every output pixel reads the source once, so an image that is cropped, resized, turned and mirrored is not resampled
four times. `nearest` returns stored values, exactly. `average` interpolates bilinearly where it enlarges and averages
with a triangle filter as wide as an output pixel where it shrinks, over known pixels only. A window along the axes and
inside the image (`Window`) needs two matrix products; one that turns (`TurnedWindow`) is low-passed by two matrix
products and then read between four pixels. No branch depends on device data, so nothing waits for the device.

Shapes: B images, p rows of one task, C channels, S stored side, Z output side, all in pixels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional


def resampling(crop: Tensor, flip: Tensor, rotation: Tensor | None, stored: int, size: int) -> "Resampling":
    """Return how to read windows of images of side `stored` as images of side `size`.

    Args:
        crop, flip, rotation: (B, 4), (B,) and (B,) or None, as `data_pipeline.batch.Batch` describes them.
        stored: S.
        size: Z.
    """
    # float64: at 512 pixels a float32 coordinate is off by 3e-5 pixels, which moves large uint16 values by whole units.
    top, left, height, width = crop.to(torch.float64).unbind(1)
    unit = (torch.arange(size, device=crop.device, dtype=torch.float64) + 0.5) / size
    mirrored = torch.where(flip[:, None], unit.flip(0), unit)
    if rotation is None:
        rows = (top[:, None] + unit * height[:, None]) * stored
        columns = (left[:, None] + mirrored * width[:, None]) * stored
        return Window(
            _pixel_of(rows, stored),
            _pixel_of(columns, stored),
            _triangle_weights(rows, height * (stored / size), stored),
            _triangle_weights(columns, width * (stored / size), stored),
        )
    cosine, sine = rotation.to(torch.float64).cos(), rotation.to(torch.float64).sin()
    down = ((unit - 0.5) * height[:, None])[:, :, None]
    right = ((mirrored - 0.5) * width[:, None])[:, None, :]
    # What turns anticlockwise as seen was read clockwise: x right and y down turn by (cos, -sin; sin, cos).
    columns = ((left + width / 2)[:, None, None] + _by(cosine, right) - _by(sine, down)) * stored
    rows = ((top + height / 2)[:, None, None] + _by(sine, right) + _by(cosine, down)) * stored
    centres = (torch.arange(stored, device=crop.device, dtype=torch.float64) + 0.5).expand(len(crop), stored)
    # An output pixel is a turned rectangle: its extent along each source axis, which is its side where it is a square.
    return TurnedWindow(
        rows,
        columns,
        _triangle_weights(centres, torch.hypot(height * cosine, width * sine) * (stored / size), stored),
        _triangle_weights(centres, torch.hypot(width * cosine, height * sine) * (stored / size), stored),
    )


@dataclass(frozen=True)
class Resampling(ABC):
    """How to read B images."""

    def of_images(self, image: Tensor) -> Self:
        """Return the resampling of the images `image` (p,), one row each."""
        return type(self)(*(value[image] for value in vars(self).values()))

    @abstractmethod
    def inside(self, stored: int) -> Tensor | None:
        """Return (B, Z, Z) bool, whether an output pixel lies in the image; None: all do."""

    def nearest(self, source: Tensor) -> Tensor:
        """Return (B, C, Z, Z) values of `source` (B, C, S, S); beyond the image that of the nearest pixel inside."""
        pixels = self._pixels(source.shape[-1])
        # One index per pixel: seven times as fast on a CPU as indexing by image, channel, row and column.
        picked = pixels.flatten(1)[:, None].expand(-1, source.shape[1], -1)
        return source.flatten(2).gather(2, picked).view(*source.shape[:2], *pixels.shape[1:])

    def average(self, source: Tensor, known: Tensor | None) -> Tensor:
        """Return (B, C, Z, Z) means of `source` (B, C, S, S) over the `known` (B, 1, S, S) pixels; None: all.

        Rounded to the source's dtype. An output pixel whose nearest source pixel is known always has a positive weight,
        so the mean exists wherever the resampled mask is True; where nothing known is near the result is 0.
        """
        values = source.to(torch.float32)
        total = self._weigh(values if known is None else values * known)
        mean = total
        if known is not None:
            mean = total / self._weigh(known.to(torch.float32)).clamp(min=torch.finfo(torch.float32).tiny)
        return mean if source.is_floating_point() else mean.round().to(source.dtype)

    @abstractmethod
    def _pixels(self, stored: int) -> Tensor:
        """Return (B, Z, Z) int64, row * S + column of the nearest source pixel."""

    @abstractmethod
    def _weigh(self, values: Tensor) -> Tensor:
        """Return (B, C, Z, Z) means of `values` (B, C, S, S) float32 with weights that sum to 1."""


@dataclass(frozen=True)
class Window(Resampling):
    """Windows along the axes that lie inside the image.

    Attributes:
        rows, columns: (B, Z) int64, the nearest source pixel.
        row_weights, column_weights: (B, Z, S) float32, the triangle filter over source pixels; rows sum to 1.
    """

    rows: Tensor
    columns: Tensor
    row_weights: Tensor
    column_weights: Tensor

    def inside(self, stored: int) -> None:
        """All output pixels lie in the image."""

    def _pixels(self, stored: int) -> Tensor:
        return self.rows[:, :, None] * stored + self.columns[:, None]

    def _weigh(self, values: Tensor) -> Tensor:
        return self.row_weights[:, None] @ values @ self.column_weights[:, None].mT


@dataclass(frozen=True)
class TurnedWindow(Resampling):
    """Windows that turn, or reach beyond the image.

    Attributes:
        rows, columns: (B, Z, Z) float64, source coordinates of the output pixels; pixel i covers [i, i + 1).
        row_filter, column_filter: (B, S, S) float32, the low-pass along each axis; rows sum to 1.
    """

    rows: Tensor
    columns: Tensor
    row_filter: Tensor
    column_filter: Tensor

    def inside(self, stored: int) -> Tensor:
        """An output pixel is inside if its centre is."""
        return (self.rows >= 0) & (self.rows < stored) & (self.columns >= 0) & (self.columns < stored)

    def _pixels(self, stored: int) -> Tensor:
        return _pixel_of(self.rows, stored) * stored + _pixel_of(self.columns, stored)

    def _weigh(self, values: Tensor) -> Tensor:
        smooth = self.row_filter[:, None] @ values @ self.column_filter[:, None].mT
        # grid_sample counts from -1 at the outer edge of the first pixel to 1 at that of the last.
        grid = torch.stack([self.columns, self.rows], dim=-1) * (2.0 / values.shape[-1]) - 1.0
        return functional.grid_sample(
            smooth, grid.to(torch.float32), mode="bilinear", padding_mode="border", align_corners=False
        )


def _by(factor: Tensor, offsets: Tensor) -> Tensor:
    return factor[:, None, None] * offsets


def _pixel_of(coordinate: Tensor, stored: int) -> Tensor:
    """Pixel i covers [i, i + 1)."""
    return coordinate.floor().long().clamp(0, stored - 1)


def _triangle_weights(coordinate: Tensor, step: Tensor, stored: int) -> Tensor:
    """(B, Z, S) weights max(0, 1 - |x - centre| / radius) with radius max(1, `step`), normalised over the image.

    `step` (B,) is the distance of neighbouring output pixels in source pixels: radius 1 is bilinear interpolation, a
    larger one averages what an output pixel covers.
    """
    centre = torch.arange(stored, device=coordinate.device, dtype=torch.float64) + 0.5
    distance = (coordinate[:, :, None] - centre).abs()
    weights = (1.0 - distance / step.clamp(min=1.0)[:, None, None]).clamp(min=0.0)
    return (weights / weights.sum(-1, keepdim=True)).to(torch.float32)
