"""Arrays of any shape to squares of one side: the largest centred square, or all of it stretched, resampled.

Codes (ids, depths, normals) take the nearest value; images and smooth maps are averaged with Pillow's triangle filter,
which covers all source pixels when shrinking.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from data_pipeline.sample import AnyArray

Fit = Literal["centre", "stretch"]
"""centre: the largest centred square, odd margins being larger at the far end; stretch: each side scaled on its own."""

# Shapes of an image and its labels may differ in size, and then round to slightly different aspects.
_ASPECT_TOLERANCE = 0.02


def square_nearest(array: AnyArray, size: int, fit: Fit = "centre") -> AnyArray:
    """Return an (H, W) or (H, W, C) array at `size` x `size` pixels; every value is one of the source's."""
    return nearest_at(_framed(array, fit), (size, size))


def square_mean(array: AnyArray, size: int, known: NDArray[np.bool_] | None = None, fit: Fit = "centre") -> AnyArray:
    """Return an array at `size` x `size` pixels as means over the `known` pixels, rounded to the array's dtype.

    Args:
        array: (H, W) or (H, W, C), uint8 or uint16.
        size: side of the result in pixels.
        known: pixels that count, of any shape with the same aspect; 0 is returned where none is near.
        fit: what of the array becomes the square.
    """
    framed = _framed(array, fit)
    channels = framed.reshape(*framed.shape[:2], -1).astype(np.float32)
    if known is None:
        means = _resize(channels, size)
    else:
        weights = nearest_at(_framed(known, fit), framed.shape[:2]).astype(np.float32)[:, :, None]
        shares = _resize(weights, size).clip(min=np.finfo(np.float32).tiny)
        means = _resize(channels * weights, size) / shares
    return means.round().astype(array.dtype).reshape(size, size, *array.shape[2:])


def nearest_at(array: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Return all of an (H, W) or (H, W, C) array at `shape` (rows, columns); every value is one of the source's."""
    rows, columns = (
        (2 * np.arange(wanted) + 1) * length // (2 * wanted)
        for wanted, length in zip(shape, array.shape[:2], strict=True)
    )
    return np.ascontiguousarray(array[rows[:, None], columns])


def check_aspect(array: AnyArray, rgb: AnyArray) -> None:
    """Check that a label covers what its image does.

    Raises:
        UserError: the sides are not in the same proportion, to within rounding.
    """
    aspects = [height / width for height, width in (array.shape[:2], rgb.shape[:2])]
    if abs(aspects[0] / aspects[1] - 1.0) > _ASPECT_TOLERANCE:
        raise UserError(f"the file is {array.shape[:2]} pixels, which is no scaling of the image's {rgb.shape[:2]}")


def _framed(array: AnyArray, fit: Fit) -> AnyArray:
    if fit == "stretch":
        return array
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def _resize(channels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(H, W, C) -> (size, size, C)."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(channels, 2, 0)]
    return np.stack([np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR)) for plane in planes], axis=2)
