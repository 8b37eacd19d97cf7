"""What tests ask of a picture."""

from pathlib import Path

import numpy as np
from PIL import Image


def ink(path: Path) -> int:
    """Number of pixels that something was drawn on."""
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        return int((np.asarray(image)[..., 3] > 0).sum())
