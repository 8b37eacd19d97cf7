"""Changes of colour against Pillow, colorsys and scipy; each image has its own strength, and margins take no part."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter
from torch import Tensor

from data_pipeline.photometric import change_colours

ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def random_images(count: int, side: int = 16, seed: int = 0) -> Tensor:
    """Images whose mean differs between the channels."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, side, side, generator=generator)
    return (noise ** torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1) * 255).round().to(torch.uint8)


def change(images: Tensor, inside: Tensor | None = None, **strengths: float) -> Tensor:
    count = len(images)
    return change_colours(images, {name: torch.full((count,), value) for name, value in strengths.items()}, inside)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("name", list(ENHANCERS))
def test_blends_are_those_of_pillow(name: str, factor: float) -> None:
    images = random_images(2)
    changed = change(images, **{name: factor})
    for image, result in zip(images, changed, strict=True):
        pillow = ENHANCERS[name](Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor)
        # Pillow rounds its grey and its result, and a factor enlarges the first error.
        assert np.abs(np.asarray(pillow) - result.permute(1, 2, 0).numpy()).max() <= 1.5 + 0.5 * abs(1 - factor)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=3), st.floats(-0.5, 0.5))
def test_hues_turn_as_in_colorsys(colour: list[int], turns: float) -> None:
    image = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)
    hue, saturation, value = colorsys.rgb_to_hsv(*(code / 255 for code in colour))
    expected = [255 * channel for channel in colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)]
    assert change(image, hue=turns).flatten().tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("sigma", [0.6, 1.5, 4.0])
def test_blur_is_gaussian_inside_and_keeps_even_colours_at_the_border(sigma: float) -> None:
    images = random_images(1, 40)
    result = change(images, blur=sigma / 40)
    ones = np.ones((40, 40))
    for channel in range(3):
        source = images[0, channel].double().numpy()
        expected = gaussian_filter(source, sigma, mode="constant", truncate=9) / gaussian_filter(
            ones, sigma, mode="constant", truncate=9
        )
        np.testing.assert_allclose(result[0, channel].numpy(), expected, atol=0.05)
    even = torch.full((1, 3, 12, 12), 77, dtype=torch.uint8)
    assert (change(even, blur=0.1) - 77).abs().max() < 1e-3


def test_neutral_strengths_change_nothing() -> None:
    images = random_images(3)
    same = change(images, brightness=1, contrast=1, saturation=1, hue=0, blur=0)
    assert (same - images).abs().max() < 1e-3
    assert torch.equal(change_colours(images, {}, None), images.to(torch.float32))


def test_saturation_zero_is_grey() -> None:
    grey = change(random_images(2), saturation=0.0, hue=0.3)
    assert (grey - grey[:, :1]).abs().max() < 1e-3


def test_each_image_has_its_own_strength_and_colours_stay_in_range() -> None:
    images = random_images(3)
    strengths = {
        "brightness": torch.tensor([0.5, 1.0, 3.0]),
        "contrast": torch.tensor([1.0, 0.2, 3.0]),
        "saturation": torch.tensor([2.0, 0.0, 3.0]),
        "hue": torch.tensor([0.1, -0.4, 0.5]),
        "blur": torch.tensor([0.0, 0.1, 0.02]),
    }
    together = change_colours(images, strengths, None)
    assert ((together >= 0) & (together <= 255 + 1e-3)).all()
    for row in range(3):
        alone = change_colours(
            images[row : row + 1], {name: value[row : row + 1] for name, value in strengths.items()}, None
        )
        torch.testing.assert_close(alone[0], together[row], atol=1e-3, rtol=0)


def test_margins_take_no_part() -> None:
    """What lies in the margin has no influence on the pixels inside."""
    images = random_images(2, 20)
    inside = torch.zeros(2, 20, 20, dtype=torch.bool)
    inside[0, 3:15, 5:] = True
    inside[1, :, :9] = True
    other = torch.where(inside[:, None], images, 255 - images)
    strengths = {"brightness": 0.8, "contrast": 1.6, "saturation": 0.5, "hue": 0.1, "blur": 0.08}
    first, second = change(images, inside, **strengths), change(other, inside, **strengths)
    shown = inside[:, None].expand_as(first)
    torch.testing.assert_close(first[shown], second[shown], atol=1e-3, rtol=0)
    assert (first[~shown] - second[~shown]).abs().max() > 1


def test_a_batch_without_images() -> None:
    empty = change(random_images(0), brightness=0.5, contrast=2.0, saturation=0.5, hue=0.2, blur=0.1)
    assert empty.shape == (0, 3, 16, 16)
