"""The 13 Taskonomy labels of a view, in the stored encodings of `configs.tasks`.

Sources: the task definitions of "Taskonomy" (CVPR 2018, supplement) and the constants of its published configurations.
Labels that Taskonomy computes from the image (edge_texture, keypoints2d, segment_unsup2d) are computed from ours;
those that it computes from a scan are exact here. Filter sizes and gradients are in pixels of the official 512 x 512
files whatever the image's size, so that values mean the same at all sizes.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, sobel

from data_pipeline.rooms.catalogue import OBJECT_CLASSES, PLACES_INDEX
from data_pipeline.rooms.regions import equal_pieces, graph_segments, merge_small
from data_pipeline.rooms.render import View
from data_pipeline.rooms.scene import Floats
from data_pipeline.sample import AnyArray

_UNITS_PER_METRE = np.float32(512)
_UNKNOWN_DEPTH = 65535
_SIZE = 512  # side of the official images
_LAMP_METRES = np.float32(2.05)  # at which a surface that faces the camera is white


def class_object(view: View) -> AnyArray:
    """(1000,) float32 logits: the log of each ImageNet class's share of the picture.

    Things count with the square root of their area, so that a wardrobe does not drown the chair before it; pieces of
    the building count a tenth. All classes share 1 % of the probability evenly, or all of it if none is in the picture.
    """
    share = np.zeros(1000)
    area = np.bincount(view.cls.ravel(), minlength=len(OBJECT_CLASSES)) / view.cls.size
    for cls, part in zip(OBJECT_CLASSES, area, strict=True):
        if cls.imagenet is not None:
            share[cls.imagenet] += np.sqrt(part) * (0.1 if cls.structure else 1.0)
    if not share.any():
        share[:] = 1
    probability = 0.99 * share / share.sum() + 0.01 / len(share)
    logits: Floats = np.log(probability).astype(np.float32)
    return logits


def class_scene(view: View) -> AnyArray:
    """(365,) float32 probabilities of the Places classes: nearly 1 for the room's type."""
    probability = np.full(365, 1e-4)
    probability[PLACES_INDEX[view.scene_type]] = 1.0
    normalised: Floats = (probability / probability.sum()).astype(np.float32)
    return normalised


def depth_euclidean(view: View) -> AnyArray:
    """(n, n) uint16: distance from the camera's centre in 1/512 m, 65535 where unknown."""
    return _encode_depth(view, view.distance)


def depth_zbuffer(view: View) -> AnyArray:
    """(n, n) uint16: depth along the camera's axis in 1/512 m, 65535 where unknown."""
    return _encode_depth(view, view.depth)


def _encode_depth(view: View, metres: Floats) -> NDArray[np.uint16]:
    units = np.minimum(metres * _UNITS_PER_METRE + 0.5, _UNKNOWN_DEPTH - 1)
    return np.where(view.valid, units, _UNKNOWN_DEPTH).astype(np.uint16)


def edge_occlusion(view: View) -> AnyArray:
    """(n, n) uint16: gradient magnitude of sqrt(depth) / 256, 0 near unknown pixels."""
    root = np.sqrt(view.depth * _UNITS_PER_METRE) / 256
    near_unknown = gaussian_filter((~view.valid).astype(np.float32), 1.0) > 1e-3
    return _gray16(np.where(near_unknown, 0, _gradient(root)))


def edge_texture(view: View) -> AnyArray:
    """(n, n) uint16: gradient magnitude of the luma blurred by 3 pixels, as a Canny detector finds before thinning."""
    return _gray16(_gradient(gaussian_filter(view.gray, max(0.6, 3 * view.size / _SIZE))))


def keypoints2d(view: View) -> AnyArray:
    """(n, n) uint16: the largest determinant of the box-filter Hessian over scales (SURF, Bay et al. 2006).

    The scales are those of the official files, standard deviations of 1 to 30 pixels of 512, as lobes of odd widths.
    """
    lobes = np.rint(np.linspace(1, 30, 6) * view.size / _SIZE).astype(int) // 2 * 2 + 1
    return _gray16(_box_hessian(view.gray, np.unique(lobes).tolist()))


def keypoints3d(view: View) -> AnyArray:
    """(n, n) uint16: where normals change within reach, most of all at borders of depth (after NARF, Steder 2010)."""
    sigma = max(1.2, 0.03 * view.focal_pixels)
    mean = gaussian_filter(view.normal, (sigma, sigma, 0))
    change = 1 - np.clip((mean * mean).sum(-1), 0, 1)
    border = gaussian_filter(np.clip(_gradient(np.sqrt(view.depth * _UNITS_PER_METRE)), 0, 1), 0.8 * sigma)
    return _gray16(gaussian_filter(change * (0.35 + border), 0.5 * sigma))


def normal(view: View) -> AnyArray:
    """(n, n, 3) uint8: (n + 1) / 2 * 255, x right, y down, z forward: facing the camera, so blue is low."""
    return encode_normal(view.normal)


def encode_normal(vectors: Floats) -> NDArray[np.uint8]:
    """Unit vectors (..., 3) as bytes."""
    encoded: NDArray[np.uint8] = np.rint((np.clip(vectors, -1, 1) + 1) * 127.5).astype(np.uint8)
    return encoded


def principal_curvature(view: View) -> AnyArray:
    """(n, n, 3) uint8: round((clip(0.03 k, -1, 1) + 1) / 2 * 254), k in 1/m, positive where convex; third channel 0.

    The curvature of larger magnitude comes first, as in the official files.
    """
    k1, k2 = view.curvature
    swap = np.abs(k2) > np.abs(k1)
    ordered = np.stack([np.where(swap, k2, k1), np.where(swap, k1, k2), np.full_like(k1, -1 / 0.03)], -1)
    return np.rint((np.clip(ordered * 0.03, -1, 1) + 1) * 127).astype(np.uint8)


def reshading(view: View) -> AnyArray:
    """(n, n, 3) uint8, equal channels: 255 min(1, 2.05 m * cosine / distance), gray matter lit by a lamp at the camera.

    The law of the official files, fitted to one of them, whose bytes it predicts to 6 in the mean.
    """
    light = np.minimum(_LAMP_METRES * view.facing / view.distance, 1)
    byte = np.rint(light * 255).astype(np.uint8)
    return np.repeat(byte[..., None], 3, -1)


def segment_unsup2d(view: View) -> AnyArray:
    """(n, n) uint8 region ids: graph-based segmentation of colours."""
    k = view.size / _SIZE
    regions = graph_segments(view.rgb, scale=70 * k, sigma=max(0.8, 3 * k), min_size=int(300 * k * k) + 8)
    return regions.astype(np.uint8)


def segment_unsup25d(view: View) -> AnyArray:
    """(n, n) uint8 region ids: pieces of one object with similar normals."""
    k = view.size / _SIZE
    code = np.rint(view.normal * 2.49).astype(np.int64) + 3
    label = ((view.object.astype(np.int64) * 8 + code[..., 0]) * 8 + code[..., 1]) * 8 + code[..., 2]
    return merge_small(equal_pieces(label), int(200 * k * k) + 8).astype(np.uint8)


def _gray16(values: Floats) -> NDArray[np.uint16]:
    return np.rint(np.clip(values, 0, 1) * 65535).astype(np.uint16)


def _gradient(image: Floats) -> Floats:
    """Gradient magnitude by Sobel filters; the factor 1 / sqrt(32) is that of the official files."""
    across, down = sobel(image, 1), sobel(image, 0)
    magnitude: Floats = np.sqrt((across * across + down * down) / 32) * np.float32(len(image) / _SIZE)
    return magnitude


def _box_hessian(image: Floats, lobes: list[int]) -> Floats:
    """Largest determinant of the Hessian, its second derivatives approximated by boxes ("lobes") of odd widths."""
    n = len(image)
    reach = 2 * max(lobes)
    padded = np.pad(image, reach, mode="reflect")
    table = np.zeros((n + 2 * reach + 1, n + 2 * reach + 1))
    table[1:, 1:] = padded.cumsum(0, dtype=np.float64).cumsum(1)

    def box(top: int, left: int, height: int, width: int) -> NDArray[np.float64]:
        """Sum over a box whose corner lies at an offset from each pixel."""
        y, x = reach + top, reach + left
        rows, low = slice(y, y + n), slice(y + height, y + height + n)
        cols, far = slice(x, x + n), slice(x + width, x + width + n)
        total: NDArray[np.float64] = table[low, far] - table[rows, far] - table[low, cols] + table[rows, cols]
        return total

    best = np.zeros((n, n))
    for lobe in lobes:
        half, side, width = lobe // 2, 2 * lobe - 1, 3 * lobe
        start = -(width // 2)
        xx = box(1 - lobe, start, side, width) - 3 * box(1 - lobe, -half, side, lobe)
        yy = box(start, 1 - lobe, width, side) - 3 * box(-half, 1 - lobe, lobe, side)
        xy = (
            box(-lobe, 1, lobe, lobe)
            + box(1, -lobe, lobe, lobe)
            - box(-lobe, -lobe, lobe, lobe)
            - box(1, 1, lobe, lobe)
        )
        best = np.maximum(best, (xx * yy - 0.81 * xy * xy) / width**4)
    return best.astype(np.float32)


LABELS: Mapping[str, Callable[[View], AnyArray]] = {
    label.__name__: label
    for label in (
        class_object,
        class_scene,
        depth_euclidean,
        depth_zbuffer,
        edge_occlusion,
        edge_texture,
        keypoints2d,
        keypoints3d,
        normal,
        principal_curvature,
        reshading,
        segment_unsup2d,
        segment_unsup25d,
    )
}
