"""Image regions: graph-based segmentation of colours, and connected pieces of equal labels."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_pipeline.rooms.scene import Bools, Floats

Ids = NDArray[np.intp]


def graph_segments(rgb: NDArray[np.uint8], *, scale: float, sigma: float, min_size: int) -> Ids:
    """(H, W) region ids 0.. of an image, by merging regions across weak borders.

    The criterion is that of Felzenszwalb and Huttenlocher (IJCV 2004): two regions merge across an edge of weight w
    if w <= min(inner(A) + scale / |A|, inner(B) + scale / |B|), inner being the heaviest edge merged inside. Merging
    goes in Boruvka rounds (every region over its lightest edge at once) instead of one edge after another. Weights
    are distances of 8-bit colours smoothed by `sigma` pixels; regions below `min_size` pixels join a neighbour.
    """
    height, width = rgb.shape[:2]
    smooth = gaussian_filter(rgb.astype(np.float32), (sigma, sigma, 0))
    a, b = _neighbour_pairs(height, width)
    flat = smooth.reshape(-1, 3)
    difference = flat[a] - flat[b]
    weight = np.sqrt((difference * difference).sum(1))
    region: Ids = np.arange(height * width)
    inner = np.zeros(len(region), np.float32)
    size = np.ones(len(region), np.float32)
    for _ in range(20):
        left, right = region[a], region[b]
        outside = left != right
        a, b, weight, left, right = (array[outside] for array in (a, b, weight, left, right))
        limit = inner + scale / size
        chosen = _lightest(left, right, weight, len(size)) & (weight <= np.minimum(limit[left], limit[right]))
        if not chosen.any():
            break
        merged = _join(left[chosen], right[chosen], len(size))
        heaviest = np.zeros(merged.max() + 1, np.float32)
        np.maximum.at(heaviest, merged, inner)
        np.maximum.at(heaviest, merged[left[chosen]], weight[chosen])
        size = np.bincount(merged, size).astype(np.float32)
        inner, region = heaviest, merged[region]
    return merge_small(region.reshape(height, width), min_size)


def equal_pieces(labels: NDArray[np.integer]) -> Ids:
    """(H, W) ids 0.. of the 4-connected pieces of equal labels."""
    flat = labels.ravel()
    a, b = _neighbour_pairs(*labels.shape)
    same = flat[a] == flat[b]
    return _join(a[same], b[same], flat.size).reshape(labels.shape)


def merge_small(regions: Ids, min_size: int, most: int = 256) -> Ids:
    """Merge regions smaller than `min_size` into their largest neighbour until none, and at most `most`, are left."""
    while True:
        size = np.bincount(regions.ravel())
        small = size < min_size
        if small.any() and len(size) > 1:
            left, right = _borders(regions)
            # Each small region joins its largest neighbour; ties go to the smaller id.
            order = np.lexsort((right, -size[right]))
            order = order[small[left[order]]]
            joiner, first = np.unique(left[order], return_index=True)
            regions = _join(joiner, right[order][first], len(size))[regions]
        elif len(size) > most:
            min_size *= 2
        else:
            return regions


def boundaries(labels: NDArray[np.integer]) -> Bools:
    """(H, W) True where the right or lower neighbour has another label: boundaries one pixel wide."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edge[:-1] |= labels[1:] != labels[:-1]
    return edge


def _neighbour_pairs(height: int, width: int) -> tuple[Ids, Ids]:
    """Flat indices of all 4-neighbour pairs."""
    index = np.arange(height * width).reshape(height, width)
    first = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    second = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    return first, second


def _borders(regions: Ids) -> tuple[Ids, Ids]:
    """Each pair of neighbouring regions, once in either order."""
    flat = regions.ravel()
    a, b = _neighbour_pairs(*regions.shape)
    left, right = flat[a], flat[b]
    differ = left != right
    count = int(flat.max()) + 1
    codes = np.unique(np.concatenate([left[differ] * count + right[differ], right[differ] * count + left[differ]]))
    return codes // count, codes % count


def _lightest(left: Ids, right: Ids, weight: Floats, count: int) -> Bools:
    """Which edges are the lightest of one of their two regions (ties: all of them)."""
    best = np.full(count, np.inf, np.float32)
    np.minimum.at(best, left, weight)
    np.minimum.at(best, right, weight)
    lightest: Bools = (weight == best[left]) | (weight == best[right])
    return lightest


def _join(a: Ids, b: Ids, count: int) -> Ids:
    """Component id 0.. of each of `count` nodes when the pairs (a, b) are joined."""
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(count, count)).tocsr()
    return connected_components(graph, directed=False)[1].astype(np.intp)
