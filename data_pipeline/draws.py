"""Random draws that depend on what they are for, not on when or where they are made.

Every draw comes from a counter-based generator (Philox, Salmon et al. 2011) whose key is a hash of the purpose and its
numbers. Hence any process gets the same draw for the same (seed, epoch, sample), in any order.
"""

import hashlib

import numpy as np


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Return the generator of `purpose` and `numbers`, such as ("augment", seed, epoch, sample)."""
    digest = hashlib.sha256(repr((purpose, *numbers)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def augmentation(
    seed: int, epoch: int, sample: int, *, flip: bool, crop_min_scale: float
) -> tuple[bool, tuple[float, float, float, float]]:
    """Draw the geometry of one sample in one epoch.

    Args:
        seed: of the run.
        epoch: from 0.
        sample: index in the shards.
        flip: whether mirroring is allowed; drawn with probability 1/2.
        crop_min_scale: smallest side of the square crop as a fraction of the image's side; 1: no crop.

    Returns:
        Whether to mirror, and the crop's (top, left, height, width) as fractions of the side. The side is uniform in
        [crop_min_scale, 1], the place uniform among those inside the image.
    """
    chance, scale, top, left = generator("augment", seed, epoch, sample).random(4).tolist()
    side = 1.0 - scale * (1.0 - crop_min_scale)
    room = 1.0 - side
    return flip and chance < 0.5, (top * room, left * room, side, side)
