"""What rooms compute as the official files do, computed from an official image and compared with its labels."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.rooms import labels_taskonomy
from tests.data_pipeline.rooms.views import a_view

REAL = Path(__file__).parents[3].parent / "shared" / "real_samples"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples in {REAL}")

Array = NDArray[np.float64]


def official(domain: str) -> Array:
    folder = REAL / domain / "replica" / "apartment_0"
    return np.asarray(Image.open(folder / f"point_47_view_25_domain_{domain}.png")).astype(float)


def agreement(ours: NDArray[np.generic], theirs: Array) -> tuple[float, float]:
    """Correlation, and the factor that maps ours to theirs best."""
    x, y = ours.astype(float).ravel(), theirs.ravel()
    return float(np.corrcoef(x, y)[0, 1]), float((x * y).sum() / (x * x).sum())


def test_texture_edges() -> None:
    view = a_view(512, rgb=official("rgb")[..., :3].astype(np.uint8))
    correlation, factor = agreement(labels_taskonomy.edge_texture(view), official("edge_texture"))
    assert correlation > 0.99
    assert factor == pytest.approx(1, abs=0.02)


def test_occlusion_edges() -> None:
    depth = official("depth_zbuffer")
    view = a_view(512, depth=(depth / 512).astype(np.float32), valid=depth < 65535)
    known = official("edge_occlusion") > 0
    correlation, factor = agreement(labels_taskonomy.edge_occlusion(view) * known, official("edge_occlusion"))
    assert correlation > 0.99
    assert factor == pytest.approx(1, abs=0.02)


def test_reshading() -> None:
    metres = official("depth_zbuffer") / 512
    across = (np.arange(512) + 0.5 - 256) / (256 / np.tan(np.radians(30)))
    ray = np.stack(np.broadcast_arrays(across[None], across[:, None], np.ones((512, 512))), -1)
    length = np.linalg.norm(ray, axis=-1)
    facing = np.clip(-((official("normal") / 127.5 - 1) * ray).sum(-1) / length, 0, 1).astype(np.float32)
    view = a_view(512, facing=facing, distance=(metres * length).astype(np.float32))
    assert np.abs(labels_taskonomy.reshading(view) - official("reshading")).mean() < 7


def test_order_of_curvatures() -> None:
    stored = np.abs(official("principal_curvature") - 127)
    curved = stored[..., :2].max(-1) > 8
    assert (stored[..., 0] >= stored[..., 1])[curved].mean() > 0.97
