"""Views made by hand, for labels whose values are known."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.rooms.render import View


def a_view(size: int, **known: NDArray[np.generic]) -> View:
    """A flat white wall at 2 m that fills the picture, but for what is given."""
    n = (size, size)
    fields = {
        "rgb": np.full((*n, 3), 255, np.uint8),
        "depth": np.full(n, 2, np.float32),
        "distance": np.full(n, 2, np.float32),
        "normal": np.broadcast_to(np.array([0, 0, -1], np.float32), (*n, 3)),
        "curvature": np.zeros((2, *n), np.float32),
        "facing": np.ones(n, np.float32),
        "valid": np.ones(n, bool),
        **{name: np.zeros(n, np.int32) for name in ("object", "cls", "part")},
        **known,
    }
    return View(focal_pixels=float(size), scene_type="office", **fields)  # type: ignore[arg-type]
