"""Draws depend on what they are for, keep windows where they belong, and fill the ranges of the configuration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.augmentation import AugmentConfig
from data_pipeline.draws import Augment, Augmentations, draw_augmentations, generator

EVERYTHING = AugmentConfig(
    crop_scale=(0.2, 1.0),
    crop_ratio=(0.75, 4 / 3),
    zoom=(0.5, 2.0),
    rotate_degrees=20,
    brightness=0.4,
    contrast=0.3,
    saturation=1.5,
    hue=0.1,
    grayscale=0.2,
    blur=0.01,
)


def draw(config: AugmentConfig, count: int, seed: int = 0) -> Augmentations:
    return draw_augmentations(Augment(seed, config), [(0, sample) for sample in range(count)])


def test_a_draw_depends_on_its_purpose_and_numbers_alone() -> None:
    first = generator("order", 1, 2).random(4)
    np.testing.assert_array_equal(generator("order", 1, 2).random(4), first)
    for other in (generator("order", 2, 1), generator("tasks", 1, 2), generator("order", 12), generator("order", 1)):
        assert not np.allclose(other.random(4), first)


def test_draws_do_not_change_between_versions() -> None:
    # A run that goes on after an upgrade must see the rest of its epoch as planned.
    assert generator("order", 0, 0).integers(0, 1000, 4).tolist() == [842, 663, 852, 435]
    drawn = draw_augmentations(Augment(3, EVERYTHING), [(1, 7)])
    assert drawn.flip.tolist() == [False]
    assert drawn.crop[0].tolist() == pytest.approx([0.3467, 0.2445, 0.4945, 0.4512], abs=1e-4)
    assert drawn.photometric["hue"].item() == pytest.approx(-0.0569, abs=1e-4)


def test_a_sample_gets_the_same_changes_in_any_batch_and_others_in_the_next_epoch() -> None:
    samples = [(epoch, sample) for epoch in range(3) for sample in range(8)]
    together = draw_augmentations(Augment(1, EVERYTHING), samples)
    seen = set()
    for row, sample in enumerate(samples):
        alone = draw_augmentations(Augment(1, EVERYTHING), [sample])
        assert torch.equal(alone.crop[0], together.crop[row])
        assert torch.equal(alone.flip[0], together.flip[row])
        assert alone.rotation is not None
        assert together.rotation is not None
        assert alone.rotation[0] == together.rotation[row]
        for name, values in together.photometric.items():
            assert alone.photometric[name][0] == values[row]
        seen.add(tuple(alone.crop[0].tolist()))
    assert len(seen) == len(samples)


def test_switching_one_change_on_leaves_the_others_as_they_were() -> None:
    every = draw(EVERYTHING, 20)
    for name in ("brightness", "contrast", "hue", "blur"):
        config = AugmentConfig.model_validate({"crop_scale": (1, 1), name: getattr(EVERYTHING, name)})
        alone = draw(config, 20)
        assert list(alone.photometric) == [name]
        assert torch.equal(alone.photometric[name], every.photometric[name])
        assert torch.equal(alone.flip, every.flip)
        assert alone.rotation is None


@given(
    st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)).map(sorted),
    st.tuples(st.floats(0.2, 5.0), st.floats(0.2, 5.0)).map(sorted),
    st.integers(0, 2**32),
)
def test_windows_lie_inside_the_image_and_have_the_area_asked_for(
    scale: list[float], ratio: list[float], seed: int
) -> None:
    config = AugmentConfig(crop_scale=(scale[0], scale[1]), crop_ratio=(ratio[0], ratio[1]))
    drawn = draw(config, 12, seed)
    top, left, height, width = drawn.crop.double().unbind(1)
    assert min(top.min(), left.min()) >= -1e-6
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area = height * width
    assert ((area > scale[0] - 1e-6) & (area < scale[1] + 1e-6)).all()
    # The ratio gives way where the window would not fit: then one side is that of the image.
    fits = (width / height > ratio[0] - 1e-4) & (width / height < ratio[1] + 1e-4)
    assert (fits | (torch.maximum(height, width) > 1 - 1e-6)).all()


def test_ranges_are_filled_evenly() -> None:
    drawn = draw(EVERYTHING.model_copy(update={"zoom": (1.0, 1.0)}), 3000)
    assert abs(drawn.flip.float().mean() - 0.5) < 0.03
    area = drawn.crop[:, 2] * drawn.crop[:, 3]
    assert (area.min(), area.max()) == (pytest.approx(0.2, abs=0.01), pytest.approx(1.0, abs=0.01))
    assert area.mean() == pytest.approx(0.6, abs=0.02)
    assert drawn.rotation is not None
    assert drawn.rotation.abs().max() == pytest.approx(math.radians(20), rel=0.01)
    assert drawn.rotation.mean() == pytest.approx(0, abs=0.01)
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "hue": (-0.1, 0.1), "blur": (0.0, 0.01)}
    for name, (least, most) in bounds.items():
        values = drawn.photometric[name]
        assert values.min() == pytest.approx(least, abs=0.01 * (most - least))
        assert values.max() == pytest.approx(most, abs=0.01 * (most - least))
        assert values.mean() == pytest.approx((least + most) / 2, abs=0.03 * (most - least))
    saturation = drawn.photometric["saturation"]
    assert (saturation == 0).float().mean() == pytest.approx(0.2, abs=0.03)
    assert (saturation.min(), saturation.max()) == (0, pytest.approx(2.5, abs=0.03))


def test_small_zooms_show_the_whole_image_in_a_margin() -> None:
    drawn = draw(AugmentConfig(crop_scale=(1, 1), zoom=(0.5, 0.8)), 50)
    assert drawn.rotation is not None
    assert (drawn.rotation == 0).all()
    top_left, size = drawn.crop[:, :2], drawn.crop[:, 2:]
    assert (size >= 1 / 0.8 - 1e-6).all()
    assert (size <= 2 + 1e-6).all()
    assert (top_left <= 0).all()
    assert (top_left + size >= 1 - 1e-6).all()


def test_some_images_lose_their_colours_and_the_others_keep_them() -> None:
    saturation = draw(AugmentConfig(grayscale=0.3), 1000).photometric["saturation"]
    assert set(saturation.tolist()) == {0.0, 1.0}
    assert (saturation == 0).float().mean() == pytest.approx(0.3, abs=0.05)


def test_no_augmentation_and_no_samples() -> None:
    plain = draw_augmentations(None, [(0, 0), (0, 1)])
    assert not plain.flip.any()
    assert plain.crop.tolist() == [[0, 0, 1, 1]] * 2
    assert (plain.rotation, plain.photometric) == (None, {})
    empty = draw_augmentations(Augment(0, EVERYTHING), [])
    assert empty.crop.shape == (0, 4)
    assert empty.photometric["hue"].shape == (0,)
