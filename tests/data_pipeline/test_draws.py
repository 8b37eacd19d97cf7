"""Draws depend on what they are for, and keep crops inside the image."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.draws import augmentation, generator


def test_a_draw_depends_on_its_purpose_and_numbers_alone() -> None:
    first = generator("order", 1, 2).random(4)
    np.testing.assert_array_equal(generator("order", 1, 2).random(4), first)
    for other in (generator("order", 2, 1), generator("tasks", 1, 2), generator("order", 12), generator("order", 1)):
        assert not np.allclose(other.random(4), first)


def test_draws_do_not_change_between_versions() -> None:
    # A run that goes on after an upgrade must see the rest of its epoch as planned.
    assert generator("order", 0, 0).integers(0, 1000, 4).tolist() == [842, 663, 852, 435]


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(0, 10**7), st.floats(0.05, 1.0))
def test_crops_are_squares_inside_the_image(seed: int, epoch: int, sample: int, smallest: float) -> None:
    flip, (top, left, height, width) = augmentation(seed, epoch, sample, flip=False, crop_min_scale=smallest)
    assert not flip
    assert height == width
    assert smallest - 1e-12 <= height <= 1
    assert min(top, left) >= 0
    assert max(top + height, left + width) <= 1 + 1e-12


def test_half_of_all_images_are_mirrored_and_crops_fill_their_range() -> None:
    draws = [augmentation(0, 0, sample, flip=True, crop_min_scale=0.5) for sample in range(2000)]
    assert abs(np.mean([flip for flip, _ in draws]) - 0.5) < 0.05
    sides = [crop[2] for _, crop in draws]
    assert min(sides) < 0.51
    assert max(sides) > 0.99
    assert abs(np.mean(sides) - 0.75) < 0.02
