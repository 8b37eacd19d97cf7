"""Random changes of colour, batched on the device; labels do not change.

Brightness, contrast, saturation and hue are those of torchvision's ColorJitter and, but for rounding, of Pillow's
ImageEnhance: each blends an image with black, with its mean grey, or with its own grey (ITU-R BT.601), or turns the
hue in HSV (A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978). The order is fixed: brightness, contrast,
saturation, hue, blur. Every image has its own strengths; which changes are made is known without asking the device.

Shapes: B images, H, W pixels; colours from 0 to 255.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from data_pipeline.constants import constant

# ITU-R BT.601, as in Pillow's conversion to "L".
_GREY_WEIGHTS = (0.299, 0.587, 0.114)
# A Gaussian this narrow, in pixels, keeps every pixel as it is.
_SHARP = 0.05


def change_colours(images: Tensor, strengths: Mapping[str, Tensor], inside: Tensor | None) -> Tensor:
    """Return the images (B, 3, H, W) in float32, their colours changed and still from 0 to 255.

    Args:
        images: (B, 3, H, W), uint8 or float.
        strengths: name of a change -> (B,); brightness, contrast and saturation are factors (1: no change; saturation
            0: grey), hue is in turns of the colour circle, blur a standard deviation as a fraction of H. Changes
            without an entry are not made.
        inside: (B, H, W) bool, pixels that show something; others take no part in means and blurs. None: all do.
    """
    images = images.to(torch.float32)
    weights = None if inside is None else inside.unsqueeze(1).to(torch.float32)
    for name, change in _CHANGES.items():
        if name in strengths:
            images = change(images, strengths[name][:, None, None, None], weights)
    return images


def _brightness(images: Tensor, factor: Tensor, weights: Tensor | None) -> Tensor:
    return _clamp(images * factor)


def _contrast(images: Tensor, factor: Tensor, weights: Tensor | None) -> Tensor:
    grey = _grey(images)
    if weights is None:
        mean = grey.mean((2, 3), keepdim=True)
    else:
        mean = (grey * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp(min=1.0)
    return _clamp(mean + factor * (images - mean))


def _saturation(images: Tensor, factor: Tensor, weights: Tensor | None) -> Tensor:
    grey = _grey(images)
    return _clamp(grey + factor * (images - grey))


def _hue(images: Tensor, turns: Tensor, weights: Tensor | None) -> Tensor:
    """Value v and chroma c stay; channel n of (5, 3, 1) of the turned hue h is v - c max(0, min(k, 4 - k, 1)), k = n +
    6 h modulo 6.
    """
    red, green, blue = torch.split(images, 1, dim=1)
    value, strongest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    unit = chroma.clamp(min=torch.finfo(torch.float32).tiny)
    sixth = torch.cat([(green - blue) / unit, (blue - red) / unit + 2.0, (red - green) / unit + 4.0], dim=1)
    hue = sixth.gather(1, strongest) + 6.0 * turns
    offset = constant([5.0, 3.0, 1.0], images).view(1, 3, 1, 1)
    k = (offset + hue).remainder(6.0)
    return value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)


def _blur(images: Tensor, deviation: Tensor, weights: Tensor | None) -> Tensor:
    """The Gaussian mean of what is near and shown: weights are normalised over the pixels inside."""
    height, width = images.shape[-2:]
    sigma = (deviation * height).clamp(min=_SHARP)
    rows, columns = (_gaussian(length, sigma, images) for length in (height, width))
    if weights is None:
        return rows / rows.sum(3, keepdim=True) @ images @ (columns / columns.sum(2, keepdim=True))
    mean = rows @ (images * weights) @ columns / (rows @ weights @ columns).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(weights > 0, mean, images)


def _gaussian(length: int, sigma: Tensor, like: Tensor) -> Tensor:
    """(B, 1, length, length) matrices exp(-(i - j)^2 / (2 sigma^2)), symmetric, not normalised."""
    position = torch.arange(length, device=like.device, dtype=like.dtype)
    return torch.exp(-0.5 * ((position[:, None] - position) / sigma).square())


def _grey(images: Tensor) -> Tensor:
    red, green, blue = torch.split(images, 1, dim=1)
    return _GREY_WEIGHTS[0] * red + _GREY_WEIGHTS[1] * green + _GREY_WEIGHTS[2] * blue


def _clamp(images: Tensor) -> Tensor:
    return images.clamp(0.0, 255.0)


_CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "blur": _blur,
}
