"""Arrays of any shape to squares of one side: the largest centred square, resampled.

Codes (ids, depths, normals) take the nearest value; images and smooth maps are averaged with Pillow's triangle filter,
which covers all source pixels when shrinking.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.sample import AnyArray


def centre_square(array: AnyArray) -> AnyArray:
    """Return the largest centred square of an (H, W) or (H, W, C) array; odd margins are larger at the far end."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


def square_nearest(array: AnyArray, size: int) -> AnyArray:
    """Return the centred square at `size` pixels; every value is one of the source's."""
    square = centre_square(array)
    nearest = (2 * np.arange(size) + 1) * len(square) // (2 * size)
    return np.ascontiguousarray(square[nearest[:, None], nearest])


def square_mean(array: AnyArray, size: int, known: NDArray[np.bool_] | None = None) -> AnyArray:
    """Return the centred square at `size` pixels as means over the `known` pixels, rounded to the array's dtype.

    Args:
        array: (H, W) or (H, W, C), uint8 or uint16.
        size: side of the result in pixels.
        known: pixels that count, of any shape with the same aspect; 0 is returned where none is near.
    """
    square = centre_square(array)
    channels = square.reshape(*square.shape[:2], -1).astype(np.float32)
    if known is None:
        means = _resize(channels, size)
    else:
        weights = square_nearest(known, len(square)).astype(np.float32)[:, :, None]
        shares = _resize(weights, size).clip(min=np.finfo(np.float32).tiny)
        means = _resize(channels * weights, size) / shares
    return means.round().astype(array.dtype).reshape(size, size, *array.shape[2:])


def _resize(channels: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(H, H, C) -> (size, size, C)."""
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(channels, 2, 0)]
    return np.stack([np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR)) for plane in planes], axis=2)
