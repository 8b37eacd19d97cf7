"""Regions of images."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label as scipy_label

from data_pipeline.rooms.regions import boundaries, equal_pieces, graph_segments, merge_small

maps = arrays(np.int64, st.tuples(st.integers(2, 12), st.integers(2, 12)), elements=st.integers(0, 3))


@given(labels=maps)
def test_pieces_are_those_of_flood_fill(labels: np.ndarray) -> None:
    pieces = equal_pieces(labels)
    count = 0
    for value in np.unique(labels):
        filled, found = scipy_label(labels == value)
        count += found
        for k in range(1, found + 1):
            assert len(np.unique(pieces[filled == k])) == 1
    assert len(np.unique(pieces)) == count


@settings(deadline=None)
@given(labels=maps, min_size=st.integers(1, 20))
def test_merging_leaves_no_small_region_and_cuts_none(labels: np.ndarray, min_size: int) -> None:
    pieces = equal_pieces(labels)
    merged = merge_small(pieces, min_size)
    sizes = np.bincount(merged.ravel())
    assert (sizes >= min(min_size, labels.size)).all() or len(sizes) == 1
    for piece in np.unique(pieces):
        assert len(np.unique(merged[pieces == piece])) == 1


def test_at_most_as_many_regions_as_asked_for() -> None:
    labels = np.arange(400).reshape(20, 20)
    assert merge_small(equal_pieces(labels), 1, most=50).max() < 50


def test_graph_segments_find_two_colours_through_noise() -> None:
    rng = np.random.default_rng(0)
    image = np.full((40, 40, 3), 60.0)
    image[:, 20:] = 160
    image[10:20, 5:15] = (200, 40, 40)
    noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    regions = graph_segments(noisy, scale=60, sigma=0.8, min_size=20)
    assert regions[2, 2] != regions[2, 38]
    assert regions[15, 10] not in (regions[2, 2], regions[2, 38])
    assert regions[2, 2] == regions[38, 2]
    assert len(np.unique(regions)) <= 6


def test_boundaries_are_one_pixel_wide() -> None:
    labels = np.zeros((6, 6), int)
    labels[:, 3:] = 1
    edge = boundaries(labels)
    assert edge[:, 2].all()
    assert edge.sum() == 6
