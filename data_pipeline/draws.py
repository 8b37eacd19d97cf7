"""Random draws that depend on what they are for, not on when or where they are made.

Every draw comes from a counter-based generator (Philox, Salmon et al. 2011) whose key is a hash of the purpose and its
numbers. Hence any process gets the same draw for the same (seed, epoch, sample), in any order and in any batch.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.augmentation import AugmentConfig

# Numbers that every sample draws, whatever is switched on: switching one change on leaves the others as they were.
_DRAWS = 13


@dataclass(frozen=True)
class Augment:
    """What the augmentation of a sample depends on, beside its epoch and its index."""

    seed: int
    config: AugmentConfig


@dataclass(frozen=True)
class Augmentations:
    """How to change B images; the fields are those of `data_pipeline.batch.Batch` with the same names."""

    flip: Tensor
    crop: Tensor
    rotation: Tensor | None
    photometric: dict[str, Tensor]


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Return the generator of `purpose` and `numbers`, such as ("augment", seed, epoch, sample)."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw_augmentations(augment: Augment | None, samples: Sequence[tuple[int, int]]) -> Augmentations:
    """Draw the changes of each (epoch, sample); None: no change.

    The window's area comes first, then its width over height (log-uniform; what does not fit in the image becomes the
    nearest that does), both divided by the zoom; its place is uniform among those inside the image or, where the window
    is larger, among those that show all of it.
    """
    if augment is None:
        full = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(len(samples), 4)
        return Augmentations(torch.zeros(len(samples), dtype=torch.bool), full.contiguous(), None, {})
    config = augment.config
    numbers = np.asarray([generator("augment", augment.seed, *sample).random(_DRAWS) for sample in samples])
    mirror, area, ratio, zoom, top, left, angle, *colours = numbers.reshape(-1, _DRAWS).T
    size = _window_sizes(config, area, ratio, zoom)
    corner = np.stack([top, left], axis=1) * (1.0 - size)
    turn = (2.0 * angle - 1.0) * math.radians(config.rotate_degrees)
    return Augmentations(
        flip=torch.from_numpy((mirror < 0.5) & config.flip),
        crop=torch.from_numpy(np.concatenate([corner, size], axis=1).astype(np.float32)),
        rotation=torch.from_numpy(turn.astype(np.float32)) if config.pads else None,
        photometric={
            name: torch.from_numpy(values.astype(np.float32)) for name, values in _photometric(config, colours).items()
        },
    )


def _window_sizes(
    config: AugmentConfig, area: NDArray[np.float64], ratio: NDArray[np.float64], zoom: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(B, 2) height and width of the windows as fractions of the side."""
    log_area = np.log(_between(config.crop_scale, area))
    least, most = (np.clip(math.log(bound), log_area, -log_area) for bound in config.crop_ratio)
    log_ratio = least + ratio * (most - least)
    sides = np.exp(0.5 * np.stack([log_area - log_ratio, log_area + log_ratio], axis=1))
    return sides / _between(config.zoom, zoom)[:, None]


def _photometric(config: AugmentConfig, colours: Sequence[NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """What is switched on of the changes of `data_pipeline.photometric`, drawn."""
    brightness, contrast, saturation, hue, grayscale, blur = colours
    drawn: dict[str, NDArray[np.float64]] = {}
    if config.brightness:
        drawn["brightness"] = _factors(config.brightness, brightness)
    if config.contrast:
        drawn["contrast"] = _factors(config.contrast, contrast)
    if config.saturation or config.grayscale:
        drawn["saturation"] = np.where(grayscale < config.grayscale, 0.0, _factors(config.saturation, saturation))
    if config.hue:
        drawn["hue"] = (2.0 * hue - 1.0) * config.hue
    if config.blur:
        drawn["blur"] = config.blur * blur
    return drawn


def _factors(strength: float, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    return _between((max(0.0, 1.0 - strength), 1.0 + strength), unit)


def _between(bounds: tuple[float, float], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    least, most = bounds
    return least + unit * (most - least)
